"""KoCLIP: scores of how well an image fits a caption, for ranking candidates and as a metric.

An image encoder (pooled features of an EfficientNet) and RoBERTa ([CLS] hidden state), each projected to a shared space;
engine.models.koclip_encoders builds them. Two similarities:
- `cosine` (default): unit-length embeddings and a learned temperature, as CLIP (Radford et al. 2021, arXiv:2103.00020).
- `published`: raw dot product * 0.07 on raw 0-255 pixels, as KoDALLE's ranker computes it, without a parameter, and
  with the constants of timm's EfficientNet (BatchNorm eps 1e-5, padding on both sides). For ranking only: its softmax
  is no probability: five images gave 1.0, 4e-9, 8e-17, ... `pixels: served` is what KoDALLE's sampling handed over
  instead of what KoCLIP was trained with: 256 pixels, not resized, in [0, 1].

With `token_similarity` (FILIP) embeddings are of tokens and of cells: E vectors of unit length for each word that is no
padding, without [CLS], and for each cell of the image; `scores` compares them. With `direction_projections` (x-clip's option by the
name of CLOOB, arXiv:2110.11316) two projections of each encoder lie side by side in an embedding: the first compares images for a
caption, which is ranking, the second captions for an image. The losses are in engine.models.koclip_losses.

Parameters at the default sizes, `mlp` head:
- `published` 116,202,620, exactly what KoDALLE's team counted: RoBERTa 110,618,112 + EfficientNet-B0 4,007,548 +
  projections 655,872 and 393,728 + 2 * 263,680 in the heads. 115,675,260 with the `linear` head. RoBERTa's number
  includes its pooling layer (590,592), which KoCLIP does not use: it is kept, frozen, for original checkpoints.
- `cosine` 115,612,029: without that pooling layer, and with one parameter more, `logit_scale`.

Shapes: B images, M captions, S pixels, T text tokens, P cells, E embed_dim (twice that with `direction_projections`), H encoder
width. (B, E) below is (B, P, E) with `token_similarity`, and (M, E) is (M, text_seq_len - 1, E).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.ranker import KoclipConfig
from engine.models.koclip_encoders import (
    Lite0ImageEncoder,
    build_image_encoder,
    build_text_encoder,
    image_features,
    load_pretrained_encoders,
    num_cells,
)
from engine.models.koclip_losses import (
    contrastive_loss,
    gather_rows,
    own_token_similarities,
    token_similarities,
)
from engine.models.roberta import PAD_TOKEN

PUBLISHED_SCALE = 0.07
_INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's: beyond it a single pair's gradient swamps the batch
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class KnownPairs(NamedTuple):
    """What is known about a batch of B pairs beside that image i is caption i's; None: nothing."""

    negatives: Tensor | None = None
    """(B', 3, S, S) images that fit no caption and have none of their own."""
    fits: Tensor | None = None
    """(B, B) bool: image j fits caption i, too, and is no negative of it."""
    wrong_text_tokens: Tensor | None = None
    """(B, K, T) captions that are wrong about image i; with has_wrong."""
    has_wrong: Tensor | None = None
    """(B,) bool: where False, those of image i are none."""


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
        self.config = config
        self.image_encoder = build_image_encoder(config)
        self.text_encoder = build_text_encoder(config)
        self.image_projection = self._head(image_features(config))
        self.text_projection = self._head(config.text_dim)
        if config.direction_projections:
            self.caption_search_image_projection = self._head(image_features(config))
            self.caption_search_text_projection = self._head(config.text_dim)
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
        known: KnownPairs | None = None,
        all_gather: bool = False,
        decoupled: bool = False,
    ) -> Tensor:
        """Training loss of B pairs: (B, 3, S, S) in [0, 1] and (B, T) -> scalar. See `loss`."""
        negatives, fits, wrong_text_tokens, has_wrong = known or KnownPairs()
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
            decoupled=decoupled,
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
        features = self.encode_pixels(pixels).to(self.image_projection.projection.weight.dtype)
        embedded = self._finish(self.image_projection(features))
        if not self.config.direction_projections:
            return embedded
        return torch.cat([embedded, self._finish(self.caption_search_image_projection(features))], dim=-1)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Features of prepared images: (B, 3, S, S) -> (B, H), or (B, P, H) with `token_similarity`."""
        if isinstance(self.image_encoder, Lite0ImageEncoder):
            features: Tensor = self.image_encoder(pixels)
            return features
        encoded = self.image_encoder(pixel_values=pixels.to(self.image_projection.projection.weight.dtype))
        if self.config.token_similarity:
            return encoded.last_hidden_state.flatten(2).transpose(1, 2)  # (B, H, h, w) -> (B, P, H)
        pooled: Tensor = encoded.pooler_output
        return pooled

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
        is_word = text_tokens != PAD_TOKEN
        hidden = self.text_encoder(text_tokens)  # (M, T, H)
        read = hidden[:, 1:] if self.config.token_similarity else hidden[:, 0]  # all but [CLS], or [CLS]
        embedded = self._finish(self.text_projection(read))
        if self.config.direction_projections:
            embedded = torch.cat([embedded, self._finish(self.caption_search_text_projection(read))], dim=-1)
        if not self.config.token_similarity:
            return embedded
        embedded = embedded.masked_fill(~is_word[:, 1:, None], 0.0)
        return F.pad(embedded, (0, 0, 0, self.config.text_seq_len - text_tokens.shape[1]))

    @property
    def image_embedding_shape(self) -> tuple[int, ...]:
        """Shape of one image's embedding."""
        width = self._embedding_width
        return (num_cells(self.config), width) if self.config.token_similarity else (width,)

    @property
    def text_embedding_shape(self) -> tuple[int, ...]:
        """Shape of one caption's embedding; it does not depend on how long the caption is."""
        width = self._embedding_width
        return (self.config.text_seq_len - 1, width) if self.config.token_similarity else (width,)

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
        images, texts = self._of_direction(image_embeddings, 0), self._of_direction(text_embeddings, 0)
        if self.config.token_similarity:
            return token_similarities(images, texts)[0]
        products = texts @ images.T
        return products if self.config.similarity == "cosine" else products * PUBLISHED_SCALE

    def caption_scores(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Scores of each caption for each image, to find an image's caption: (B, E), (M, E) -> (B, M).

        `scores` the other way round but for `token_similarity` and `direction_projections`, which compare otherwise.
        """
        if self._is_symmetric:
            return self.scores(image_embeddings, text_embeddings).T
        images, texts = self._of_direction(image_embeddings, 1), self._of_direction(text_embeddings, 1)
        return token_similarities(images, texts)[1] if self.config.token_similarity else images @ texts.T

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
        decoupled: bool = False,
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
            decoupled: see `contrastive_loss`.

        Returns:
            scalar float32.
        """
        if all_gather:
            image_embeddings = gather_rows(image_embeddings)  # (B, E) -> (ranks * B, E)
            text_embeddings = gather_rows(text_embeddings)
            negatives = None if negatives is None else gather_rows(negatives)
            fits = None if fits is None else gather_rows(fits.to(torch.uint8)).bool()
            if wrong is not None and has_wrong is not None:
                wrong, has_wrong = gather_rows(wrong), gather_rows(has_wrong.to(torch.uint8)).bool()
        B = len(text_embeddings)
        images = image_embeddings if negatives is None else torch.cat([image_embeddings, negatives])
        left_out = None if fits is None else fits & ~torch.eye(B, dtype=torch.bool, device=fits.device)
        padded = None if left_out is None else F.pad(left_out, (0, len(images) - B))
        to_images = self._logits(self.scores(images, text_embeddings), padded)  # (B, B + B')
        if self._is_symmetric:
            to_captions = to_images[:, :B].T  # (B, B)
        else:
            found = self.caption_scores(image_embeddings, text_embeddings)
            to_captions = self._logits(found, None if left_out is None else left_out.T)
        if wrong is not None and has_wrong is not None:
            own = self._logits(self._own_caption_scores(image_embeddings, wrong), ~has_wrong[:, None])
            to_captions = torch.cat([to_captions, own], dim=1)  # (B, B + K)
        return contrastive_loss(to_images, to_captions, decoupled=decoupled)

    def _own_caption_scores(self, images: Tensor, captions: Tensor) -> Tensor:
        """`caption_scores` of captions of each image's own: (B, E), (B, K, E) -> (B, K)."""
        images, captions = self._of_direction(images, 1), self._of_direction(captions, 1)
        if self.config.token_similarity:
            return own_token_similarities(images, captions)
        products = torch.einsum("be,bke->bk", images, captions)
        return products if self.config.similarity == "cosine" else products * PUBLISHED_SCALE

    def _logits(self, scores: Tensor, left_out: Tensor | None) -> Tensor:
        """Scores at the temperature; those left out are -inf."""
        logits = scores * self.temperature_scale() if self.config.similarity == "cosine" else scores
        return logits if left_out is None else logits.masked_fill(left_out, -math.inf)

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

    def _head(self, hidden_dim: int) -> ProjectionHead:
        return ProjectionHead(hidden_dim, self.config.embed_dim, kind=self.config.head, dropout=self.config.dropout)

    @property
    def _embedding_width(self) -> int:
        return self.config.embed_dim * (2 if self.config.direction_projections else 1)

    @property
    def _is_symmetric(self) -> bool:
        """Whether a caption's score for an image is the image's for the caption."""
        return not (self.config.token_similarity or self.config.direction_projections)

    def _of_direction(self, embeddings: Tensor, direction: int) -> Tensor:
        """The part of embeddings that compares images for a caption (0) or captions for an image (1)."""
        return embeddings.chunk(2, dim=-1)[direction] if self.config.direction_projections else embeddings

    def _finish(self, projected: Tensor) -> Tensor:
        projected = projected.float()
        return F.normalize(projected, dim=-1) if self.config.similarity == "cosine" else projected
