"""KoCLIP with self-supervised objectives beside the contrastive one: views of images, masked captions. For training alone.

    image_ssl        two views of each image through the image encoder and a projector: SimCLR (SLIP, arXiv:2112.12750) or SimSiam
                     (DeCLIP, arXiv:2110.05208), which has a predictor on top
    masked_language  a share of each caption's tokens is masked and predicted from the text encoder's hidden states (DeCLIP)

x-clip's options, with its weights: of the loss they take their share, and the contrastive loss keeps the rest.

What is trained beside KoCLIP (projector, predictor, a layer to text tokens) has no place in a model folder: export `koclip` alone.
Projector and predictor see the rows of all ranks, so that their BatchNorm, which keeps no statistics, and the loss are those of one
process with the whole batch.

Shapes: B images, S pixels, T text tokens, K masked positions a caption at most, H encoder width, D image_ssl_dim.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.stages import KoclipLossConfig
from engine.models.koclip import KnownPairs, KoClip
from engine.models.koclip_encoders import image_features, statistics_kept
from engine.models.koclip_losses import gather_rows, nt_xent, simsiam


class KoclipLosses(NamedTuple):
    """Losses of a batch, 0-d float32; None where an objective is off."""

    total: Tensor
    contrastive: Tensor
    image_ssl: Tensor | None
    masked_language: Tensor | None


class MaskedCaptions(NamedTuple):
    """Captions with tokens masked (engine.data.masked_captions), int64."""

    text_tokens: Tensor
    """(B, T)"""
    positions: Tensor
    """(B, K): where; 0 fills up."""
    originals: Tensor
    """(B, K): what stood there; -100 fills up."""


class ImageSsl(nn.Module):
    """Projector, with SimSiam a predictor, and the loss of two views: (B, 2, H) features -> scalar."""

    def __init__(self, features: int, loss: KoclipLossConfig) -> None:
        super().__init__()
        self.kind, self.temperature = loss.image_ssl, loss.image_ssl_temperature
        hidden, dim = loss.image_ssl_hidden_dim, loss.image_ssl_dim
        self.projector = nn.Sequential(
            *_layer(features, hidden), *_layer(hidden, hidden),
            nn.Linear(hidden, dim, bias=False, dtype=torch.float32), _batch_norm(dim, affine=False),
        )  # fmt: skip
        if self.kind == "simsiam":
            self.predictor = nn.Sequential(*_layer(dim, hidden), nn.Linear(hidden, dim, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        first = self.projector[0]
        assert isinstance(first, nn.Linear)
        projections = self.projector(features.flatten(0, 1).to(first.weight.dtype))
        if self.kind == "simclr":
            return nt_xent(projections.unflatten(0, (-1, 2)), temperature=self.temperature)
        predictions = self.predictor(projections)
        return simsiam(predictions.unflatten(0, (-1, 2)), projections.unflatten(0, (-1, 2)))


class KoClipWithObjectives(nn.Module):
    """A KoCLIP, and what trains beside it. `loss` has one objective at least."""

    def __init__(self, koclip: KoClip, loss: KoclipLossConfig) -> None:
        super().__init__()
        self.koclip, self.loss = koclip, loss
        if loss.image_ssl is not None:
            self.image_ssl = ImageSsl(image_features(koclip.config), loss)
        if loss.masked_language_weight:
            self.masked_language = nn.Linear(koclip.config.text_dim, koclip.config.text_vocab_size, dtype=torch.float32)

    def forward(
        self,
        images: Tensor,
        text_tokens: Tensor,
        *,
        known: KnownPairs | None = None,
        views: Tensor | None = None,
        masked: MaskedCaptions | None = None,
        all_gather: bool = False,
    ) -> KoclipLosses:
        """Training losses of B pairs; the arguments of `KoClip.forward`, and:

        Args:
            views: (B, 2, 3, S, S) float in [0, 1], with `image_ssl`.
            masked: the captions, masked, with `masked_language`.
        """
        contrastive = self.koclip(
            images, text_tokens, known=known, all_gather=all_gather, decoupled=self.loss.decoupled
        )
        total = contrastive * self.loss.contrastive_weight
        image_ssl = masked_language = None
        if views is not None:
            image_ssl = self._image_ssl(views, all_gather=all_gather)
            total = total + image_ssl * self.loss.image_ssl_weight
        if masked is not None:
            masked_language = self._masked_language(masked, all_gather=all_gather)
            total = total + masked_language * self.loss.masked_language_weight
        return KoclipLosses(total, contrastive, image_ssl, masked_language)

    def _image_ssl(self, views: Tensor, *, all_gather: bool) -> Tensor:
        pixels = self.koclip.prepare(views.flatten(0, 1))
        with statistics_kept(self.koclip.image_encoder):
            features = self.koclip.encode_pixels(pixels)  # (2B, H)
        if self.koclip.config.token_similarity:
            features = features.mean(dim=1)  # of an image's cells
        features = features.unflatten(0, (-1, 2))
        loss: Tensor = self.image_ssl(gather_rows(features) if all_gather else features)
        return loss

    def _masked_language(self, masked: MaskedCaptions, *, all_gather: bool) -> Tensor:
        """Mean cross-entropy over masked tokens, of all ranks: each rank returns its part, so that the mean of ranks is right."""
        tokens = masked.text_tokens
        hidden = self.koclip.text_encoder(tokens)
        read = hidden.gather(1, masked.positions[:, :, None].expand(-1, -1, hidden.shape[2]))  # (B, K, H)
        logits = self.masked_language(read.to(self.masked_language.weight.dtype)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), masked.originals.flatten(), reduction="sum")  # -100 is passed over
        count = (masked.originals >= 0).sum().float()
        if all_gather and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count, op=dist.ReduceOp.SUM)
            count = count / dist.get_world_size()
        return nats / count.clamp(min=1.0)


def _layer(inside: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inside, out, bias=False, dtype=torch.float32), _batch_norm(out), nn.ReLU()


def _batch_norm(features: int, *, affine: bool = True) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(features, affine=affine, track_running_stats=False, dtype=torch.float32)
