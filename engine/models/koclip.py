"""KoCLIP: scores of how well an image fits a caption, for ranking candidates and as a metric.

An image encoder (pooled features of an EfficientNet) and RoBERTa ([CLS] hidden state), each projected to a shared space;
engine.models.koclip_encoders builds them. Two similarities:
- `cosine` (default): unit-length embeddings and a learned temperature, as CLIP (Radford et al. 2021, arXiv:2103.00020).
- `published`: raw dot product * 0.07 on raw 0-255 pixels, as KoDALLE's ranker computes it, without a parameter, and
  with the constants of timm's EfficientNet (BatchNorm eps 1e-5, padding on both sides). For ranking only: its softmax
  is no probability: five images gave 1.0, 4e-9, 8e-17, ... `pixels: served` is what KoDALLE's sampling handed over
  instead of what KoCLIP was trained with: 256 pixels, not resized, in [0, 1].

Parameters at the default sizes, `mlp` head:
- `published` 116,202,620, exactly what KoDALLE's team counted: RoBERTa 110,618,112 + EfficientNet-B0 4,007,548 +
  projections 655,872 and 393,728 + 2 * 263,680 in the heads. 115,675,260 with the `linear` head. RoBERTa's number
  includes its pooling layer (590,592), which KoCLIP does not use: it is kept, frozen, for original checkpoints.
- `cosine` 115,612,029: without that pooling layer, and with one parameter more, `logit_scale`.

Shapes: B images, M captions, S pixels, T text tokens, E embed_dim, H encoder width.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.ranker import KoclipConfig
from engine.models.environment import check_torchvision
from engine.models.koclip_encoders import (
    PAD_TOKEN,
    Lite0ImageEncoder,
    build_image_encoder,
    build_text_encoder,
    image_features,
    load_pretrained_encoders,
)

PUBLISHED_SCALE = 0.07
_INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's: beyond it a single pair's gradient swamps the batch
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class ProjectionHead(nn.Module):
    """Encoder features to the shared space: (B, H) -> (B, E). Names are KoCLIP's (`projection`, `fc`, `layer_norm`).

    `mlp`: p = linear(x); layer_norm(p + dropout(fc(gelu(p)))). `linear`: p alone.
    """

    def __init__(self, hidden_dim: int, embed_dim: int, *, kind: Literal["mlp", "linear"], dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.projection = nn.Linear(hidden_dim, embed_dim, dtype=torch.float32)
        if kind == "mlp":
            self.fc = nn.Linear(embed_dim, embed_dim, dtype=torch.float32)
            self.dropout = nn.Dropout(dropout)
            self.layer_norm = nn.LayerNorm(embed_dim, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features)  # (B, H) -> (B, E)
        if self.kind == "linear":
            return projected
        return self.layer_norm(projected + self.dropout(self.fc(F.gelu(projected))))


class KoClip(nn.Module):
    """Image and caption encoders with a shared space. Random weights; see `from_pretrained_encoders`.

    Args:
        config: sizes. `dropout` acts in the heads and in RoBERTa.

    Raises:
        InputError: sizes that do not fit together, or an installation that cannot load the encoders.
    """

    def __init__(self, config: KoclipConfig) -> None:
        super().__init__()
        check_torchvision()
        self.config = config
        self.image_encoder = build_image_encoder(config)
        self.text_encoder = build_text_encoder(config)
        self.image_projection = ProjectionHead(
            image_features(config), config.embed_dim, kind=config.head, dropout=config.dropout
        )
        self.text_projection = ProjectionHead(
            config.text_dim, config.embed_dim, kind=config.head, dropout=config.dropout
        )
        if config.similarity == "cosine":
            # One element, not a scalar: DeepSpeed broadcasts parameters as bytes, which torch refuses for 0-d tensors.
            self.logit_scale = nn.Parameter(torch.tensor([_INITIAL_LOGIT_SCALE], dtype=torch.float32))

    @classmethod
    def from_pretrained_encoders(
        cls, config: KoclipConfig, *, text_encoder: str | None = None, image_encoder: str | None = None
    ) -> "KoClip":
        """Starts from trained encoders; projections (and what is None) stay random. EfficientNet-Lite0 is always trained.

        Args:
            config: sizes; they must be the encoders' own.
            text_encoder: name or folder of a RoBERTa with safetensors weights (klue/roberta-base).
            image_encoder: name or folder of an EfficientNet with safetensors weights (google/efficientnet-b0).

        Raises:
            InputError: not found, not that kind of model, no safetensors, or the first tensor whose shape differs.
        """
        model = cls(config)
        load_pretrained_encoders(
            model.text_encoder, model.image_encoder, text_source=text_encoder, image_source=image_encoder
        )
        return model

    def forward(
        self,
        images: Tensor,
        text_tokens: Tensor,
        *,
        negatives: Tensor | None = None,
        fits: Tensor | None = None,
        wrong_text_tokens: Tensor | None = None,
        has_wrong: Tensor | None = None,
        all_gather: bool = False,
    ) -> Tensor:
        """Training loss of B pairs: (B, 3, S, S) in [0, 1] and (B, T) -> scalar. See `loss`.

        Args:
            negatives: (B', 3, S, S) images that fit no caption.
            wrong_text_tokens: (B, K, T) captions that are wrong about image i; with has_wrong.
        """
        # One pass: batch norm normalises both with the same statistics, as in ranking.
        embedded = self.embed_images(images if negatives is None else torch.cat([images, negatives]))
        B = len(text_tokens)
        wrong = [] if wrong_text_tokens is None else [wrong_text_tokens.flatten(0, 1)]
        texts = self.embed_texts(torch.cat([text_tokens, *wrong]))  # (B + B * K, E)
        return self.loss(
            embedded[: len(images)],
            texts[:B],
            negatives=None if negatives is None else embedded[len(images) :],
            fits=fits,
            wrong=None if wrong_text_tokens is None else texts[B:].unflatten(0, wrong_text_tokens.shape[:2]),
            has_wrong=has_wrong,
            all_gather=all_gather,
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """Images to the shared space: (B, 3, any, any) float in [0, 1] -> (B, E) float32; unit length in `cosine`.

        Resized to config.image_size (bilinear, antialiased) when they are not that size.

        Raises:
            ValueError: wrong shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        return self.embed_pixels(self.prepare(images))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared images to the shared space: (B, 3, S, S) -> (B, E) float32. Without checks, for CUDA graphs."""
        dtype = self.image_projection.projection.weight.dtype
        if isinstance(self.image_encoder, Lite0ImageEncoder):
            features = self.image_encoder(pixels)  # (B, H)
        else:
            features = self.image_encoder(pixel_values=pixels.to(dtype)).pooler_output
        return self._finish(self.image_projection(features.to(dtype)))

    def embed_texts(self, text_tokens: Tensor) -> Tensor:
        """Captions to the shared space: (M, T) integers, padded with 1 -> (M, E) float32; unit length in `cosine`.

        Raises:
            ValueError: wrong shape or type, or longer than config.text_seq_len.
        """
        if text_tokens.dim() != 2 or text_tokens.is_floating_point():
            raise ValueError(f"text tokens must be (M, T) integers, got {tuple(text_tokens.shape)} {text_tokens.dtype}")
        if text_tokens.shape[1] > self.config.text_seq_len:
            raise ValueError(f"{text_tokens.shape[1]} text tokens, this KoCLIP has {self.config.text_seq_len}")
        text_tokens = text_tokens.long()
        hidden = self.text_encoder(input_ids=text_tokens, attention_mask=text_tokens != PAD_TOKEN).last_hidden_state
        return self._finish(self.text_projection(hidden[:, 0]))  # [CLS]: (M, T, H) -> (M, H)

    def trim(self, text_tokens: list[int]) -> list[int]:
        """A caption's tokens without the padding after them."""
        end = len(text_tokens)
        while end > 1 and text_tokens[end - 1] == PAD_TOKEN:
            end -= 1
        return text_tokens[:end]

    def scores(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Ranking scores of each image for each caption: (B, E), (M, E) -> (M, B).

        `cosine`: -1..1, comparable between runs and captions. `published`: dot product * 0.07, unbounded.
        """
        products = text_embeddings @ image_embeddings.T
        return products if self.config.similarity == "cosine" else products * PUBLISHED_SCALE

    @torch.no_grad()
    def similarity(self, images: Tensor, text_tokens: Tensor) -> Tensor:
        """`scores` of images (B, 3, any, any) in [0, 1] and captions (M, T): (M, B). Call in eval mode."""
        return self.scores(self.embed_images(images), self.embed_texts(text_tokens))

    def loss(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        *,
        negatives: Tensor | None = None,
        fits: Tensor | None = None,
        wrong: Tensor | None = None,
        has_wrong: Tensor | None = None,
        all_gather: bool = False,
    ) -> Tensor:
        """Symmetric contrastive loss: cross-entropy of each caption's image and of each image's caption in the batch.

        Args:
            image_embeddings: (B, E), row i belongs to caption i.
            text_embeddings: (B, E).
            negatives: (B', E) images that match no caption and have none of their own.
            fits: (B, B) bool, (B, ranks * B) with `all_gather`: image j fits caption i. A pair that fits and is not
                (i, i) is no negative: it is left out of both softmaxes. None: all of them are negatives.
            wrong: (B, K, E) captions that are wrong about image i: negatives of it alone, since they may fit another.
            has_wrong: (B,) bool, with `wrong`: those of image i are none.
            all_gather: contrast with the pairs of all ranks (B equal on each). Every rank then returns the loss of the
                whole batch, and gradients averaged over ranks, as data parallelism does, are those of one process
                with the whole batch. No effect without a process group.

        Returns:
            scalar float32.
        """
        if all_gather and dist.is_available() and dist.is_initialized():
            image_embeddings = _GatherRows.apply(image_embeddings)  # (B, E) -> (ranks * B, E)
            text_embeddings = _GatherRows.apply(text_embeddings)
            negatives = None if negatives is None else _GatherRows.apply(negatives)
            fits = None if fits is None else _GatherRows.apply(fits.to(torch.uint8)).bool()
            if wrong is not None and has_wrong is not None:
                wrong = _GatherRows.apply(wrong.contiguous())
                has_wrong = _GatherRows.apply(has_wrong.to(torch.uint8)).bool()
        B = len(text_embeddings)
        images = image_embeddings if negatives is None else torch.cat([image_embeddings, negatives])
        logits = self._scaled(text_embeddings @ images.T)  # (B, B + B')
        if fits is not None:
            left_out = fits & ~torch.eye(B, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(F.pad(left_out, (0, logits.shape[1] - B)), -math.inf)
        pairs = torch.arange(B, dtype=torch.int64, device=logits.device)
        of_images = logits[:, :B].T  # (B, B): each image's captions
        if wrong is not None and has_wrong is not None:
            own = self._scaled(torch.einsum("be,bke->bk", image_embeddings, wrong))
            of_images = torch.cat([of_images, own.masked_fill(~has_wrong[:, None], -math.inf)], dim=1)  # (B, B + K)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(of_images, pairs)) / 2

    def temperature_scale(self) -> Tensor:
        """The learned factor on cosines, at most 100 (`cosine` only), 0-d float32."""
        # The excess is subtracted as a constant: a plain clamp has no gradient above the bound.
        scale = self.logit_scale.float().squeeze(0)
        return (scale - (scale - _MAX_LOGIT_SCALE).clamp(min=0).detach()).exp()

    def prepare(self, images: Tensor) -> Tensor:
        """Resized to config.image_size and normalised as the encoder expects: (B, 3, any, any) -> (B, 3, S, S) float32."""
        S = self.config.image_size
        images = images.float()
        if self.config.pixels == "served":
            return images
        if images.shape[2:] != (S, S):
            images = F.interpolate(images, size=(S, S), mode="bilinear", align_corners=False, antialias=True)
        if self.config.image_encoder == "efficientnet-lite0":
            return images  # it scales them itself
        if self.config.similarity == "published":
            return images * 255.0
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        return (images - mean) / std

    def _scaled(self, products: Tensor) -> Tensor:
        """Logits of dot products, of any shape."""
        return products * (self.temperature_scale() if self.config.similarity == "cosine" else PUBLISHED_SCALE)

    def _finish(self, projected: Tensor) -> Tensor:
        projected = projected.float()
        return F.normalize(projected, dim=-1) if self.config.similarity == "cosine" else projected


class _GatherRows(torch.autograd.Function):
    """(B, E) on each rank -> (ranks * B, E) on every rank, rank by rank.

    Backward needs no communication: every rank computes the same loss from the same rows, so the sum over ranks of
    the gradients is `ranks` times the gradient of this rank.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        return gradient.chunk(ranks)[dist.get_rank()] * ranks
