"""KoCLIP: scores of how well an image fits a caption, for ranking candidates and as a metric.

EfficientNet (pooled features) and RoBERTa ([CLS] hidden state), both from transformers, each projected to a shared
space. Two similarities:
- `cosine` (default): unit-length embeddings and a learned temperature, as CLIP (Radford et al. 2021, arXiv:2103.00020).
- `published`: raw dot product * 0.07 on raw 0-255 pixels, as KoDALLE's ranker computes it, without a parameter. For
  ranking only: its softmax is no probability: five images gave 1.0, 4e-9, 8e-17, ...

Parameters at the default sizes, `mlp` head:
- `published` 116,202,620, exactly what KoDALLE's team counted: RoBERTa 110,618,112 + EfficientNet-B0 4,007,548 +
  projections 655,872 and 393,728 + 2 * 263,680 in the heads. 115,675,260 with the `linear` head. RoBERTa's number
  includes its pooling layer (590,592), which KoCLIP does not use: it is kept, frozen, for original checkpoints.
- `cosine` 115,612,029: without that pooling layer, and with one parameter more, `logit_scale`.

Shapes: B images, M captions, S pixels, T text tokens, E embed_dim, H encoder width.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import KoclipConfig
from engine.errors import InputError
from engine.models.environment import check_torchvision

if TYPE_CHECKING:
    # Only here: at run time they are imported after check_torchvision(), so that a broken torchvision is named.
    from transformers import EfficientNetConfig, EfficientNetModel, RobertaModel

PAD_TOKEN = 1  # RoBERTa's; its position numbers start after it
PUBLISHED_SCALE = 0.07
_INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's: beyond it a single pair's gradient swamps the batch
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_EFFICIENTNET_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_EFFICIENTNET_REPEATS = (1, 2, 2, 3, 3, 4, 1)


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
        self.image_encoder = _build_image_encoder(config)
        self.text_encoder = _build_text_encoder(config)
        self.image_projection = ProjectionHead(
            config.image_hidden_dim, config.embed_dim, kind=config.head, dropout=config.dropout
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
        """Starts from encoders in Hugging Face format; projections (and what is None) stay random.

        Args:
            config: sizes; they must be the encoders' own.
            text_encoder: name or folder of a RoBERTa with safetensors weights (klue/roberta-base).
            image_encoder: name or folder of an EfficientNet with safetensors weights (google/efficientnet-b0).

        Raises:
            InputError: not found, not that kind of model, no safetensors, or the first tensor whose shape differs.
        """
        model = cls(config)
        if text_encoder is not None:
            field = "pretrained_text_encoder"
            _load_into(model.text_encoder, _fetch("roberta", text_encoder, field=field), text_encoder, field=field)
        if image_encoder is not None:
            field = "pretrained_image_encoder"
            _load_into(
                model.image_encoder, _fetch("efficientnet", image_encoder, field=field), image_encoder, field=field
            )
        return model

    def forward(
        self, images: Tensor, text_tokens: Tensor, *, negatives: Tensor | None = None, all_gather: bool = False
    ) -> Tensor:
        """Training loss of B pairs: (B, 3, S, S) in [0, 1] and (B, T) -> scalar. See `loss`.

        Args:
            negatives: (B', 3, S, S) images that fit no caption.
        """
        if negatives is None:
            return self.loss(self.embed_images(images), self.embed_texts(text_tokens), all_gather=all_gather)
        # One pass: batch norm normalises both with the same statistics, as in ranking.
        embedded = self.embed_images(torch.cat([images, negatives]))
        return self.loss(
            embedded[: len(images)],
            self.embed_texts(text_tokens),
            negatives=embedded[len(images) :],
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
        pixels = pixels.to(self.image_projection.projection.weight.dtype)
        features = self.image_encoder(pixel_values=pixels).pooler_output  # (B, H)
        return self._finish(self.image_projection(features))

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
        all_gather: bool = False,
    ) -> Tensor:
        """Symmetric contrastive loss: cross-entropy of each caption's image and of each image's caption in the batch.

        Args:
            image_embeddings: (B, E), row i belongs to caption i.
            text_embeddings: (B, E).
            negatives: (B', E) images that match no caption and have none of their own.
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
        B = len(text_embeddings)
        images = image_embeddings if negatives is None else torch.cat([image_embeddings, negatives])
        logits = self.scores(images, text_embeddings)  # (B, B + B')
        if self.config.similarity == "cosine":
            logits = logits * self.temperature_scale()
        pairs = torch.arange(B, dtype=torch.int64, device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits[:, :B].T, pairs)) / 2

    def temperature_scale(self) -> Tensor:
        """The learned factor on cosines, at most 100 (`cosine` only), 0-d float32."""
        # The excess is subtracted as a constant: a plain clamp has no gradient above the bound.
        scale = self.logit_scale.float().squeeze(0)
        return (scale - (scale - _MAX_LOGIT_SCALE).clamp(min=0).detach()).exp()

    def prepare(self, images: Tensor) -> Tensor:
        """Resized to config.image_size and normalised as in training: (B, 3, any, any) -> (B, 3, S, S) float32."""
        S = self.config.image_size
        images = images.float()
        if images.shape[2:] != (S, S):
            images = F.interpolate(images, size=(S, S), mode="bilinear", align_corners=False, antialias=True)
        if self.config.similarity == "published":
            return images * 255.0
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        return (images - mean) / std

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


# ------------------------------------------------------------------------------------------------- building encoders


def efficientnet_width(width: float) -> int:
    """Pooled channels of EfficientNet at a width coefficient: 1280 scaled, to a multiple of 8. B0 (1.0): 1280."""
    scaled = 1280 * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


def _build_image_encoder(config: KoclipConfig) -> "EfficientNetModel":
    from transformers import EfficientNetModel

    made = efficientnet_width(config.image_width)
    if config.image_hidden_dim != made:
        raise InputError(
            "image_hidden_dim",
            config.image_hidden_dim,
            f"an EfficientNet of width {config.image_width} makes {made} features: write image_hidden_dim: {made}",
        )
    encoder = EfficientNetModel(_efficientnet_config(config)).float()  # transformers builds in the default dtype
    _initialise_efficientnet(encoder)
    return encoder


def _efficientnet_config(config: KoclipConfig) -> "EfficientNetConfig":
    from transformers import EfficientNetConfig

    published_size = config.image_width >= 1 and config.image_depth >= 1
    return EfficientNetConfig(
        image_size=config.image_size,
        width_coefficient=config.image_width,
        depth_coefficient=config.image_depth,
        hidden_dim=config.image_hidden_dim,
        depthwise_padding=_odd_strided_blocks(config.image_size, config.image_depth),
        # Keras defines momentum the other way round: 0.99 there is 0.01 in torch, but transformers passes 0.99 to
        # torch, so that evaluation would use the statistics of the last batch only (a tiny KoCLIP, trained to a loss
        # of 1.66, evaluated to 2.09 so, and to 1.85 with torch's own default of 0.1).
        batch_norm_momentum=0.1,
        # Regularisation for training long on much data; a small encoder on small data underfits with it.
        drop_connect_rate=0.2 if published_size else 0.0,
    )


def _odd_strided_blocks(image_size: int, depth: float) -> list[int]:
    """Blocks that halve an odd-sized map, which need padding on both sides to equal the TensorFlow original.

    EfficientNet-B2 (260 px, depth 1.2) gives [5, 8, 16], which its published config spells out; B0 at 224 px none.
    """
    odd, block, size = [], 0, image_size // 2  # the stem halves
    for stride, repeats in zip(_EFFICIENTNET_STRIDES, _EFFICIENTNET_REPEATS, strict=True):
        if stride == 2:
            if size % 2:
                odd.append(block)
            size = (size + 1) // 2
        block += math.ceil(depth * repeats)
    return odd


def _initialise_efficientnet(encoder: "EfficientNetModel") -> None:
    """The initialisation of the EfficientNet paper's code (normal, variance 2 / fan-out; BatchNorm 1, 0).

    transformers samples BatchNorm's gains from N(0, 0.02), which only suits weights that a checkpoint overwrites: the
    signal shrinks fiftyfold a layer and a model trained from scratch does not learn (48 synthetic pairs, 60 steps: loss
    3.87 = log(48) throughout; about 1 with this initialisation).
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _build_text_encoder(config: KoclipConfig) -> "RobertaModel":
    from transformers import RobertaConfig, RobertaModel

    if config.text_dim % config.text_heads:
        raise InputError("text_dim", config.text_dim, f"must be divisible by text_heads ({config.text_heads})")
    roberta = RobertaConfig(
        vocab_size=config.text_vocab_size,
        hidden_size=config.text_dim,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_ff_dim,
        max_position_embeddings=config.text_position_rows,
        type_vocab_size=1,
        pad_token_id=PAD_TOKEN,
        layer_norm_eps=1e-5,  # klue/roberta's, as RoBERTa's; transformers' default is BERT's 1e-12
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )
    # [CLS] is used without the pooling layer. Original checkpoints hold it all the same; frozen, it costs memory only,
    # and no optimiser or data-parallel engine waits for its gradient.
    original = config.similarity == "published"
    encoder = RobertaModel(roberta, add_pooling_layer=original).float()
    if original:
        encoder.pooler.requires_grad_(False)
    return encoder


# --------------------------------------------------------------------------------------------------- loading encoders


def _fetch(kind: Literal["roberta", "efficientnet"], source: str, *, field: str) -> dict[str, Tensor]:
    """Tensors of a Hugging Face model, name or folder. Safetensors only; never runs code from the repository."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, EfficientNetModel, RobertaModel

    remedy = f"give the name or folder of a {kind} model with safetensors weights"
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if found.model_type != kind:
            raise InputError(field, source, f"is a {found.model_type} model: {remedy}")
        if kind == "roberta":
            model, report = RobertaModel.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, add_pooling_layer=False
            )
        else:
            model, report = EfficientNetModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise InputError(field, source, f"cannot be loaded ({str(error).splitlines()[0]}): {remedy}") from error
    if report["missing_keys"]:
        raise InputError(field, source, f"lacks the tensor {min(report['missing_keys'])}: {remedy}")
    return model.state_dict()


def _load_into(encoder: nn.Module, tensors: dict[str, Tensor], source: str, *, field: str) -> None:
    expected = encoder.state_dict()
    # RoBERTa's pooling layer is not used, and most published RoBERTas lack it: it stays as it is.
    tensors = tensors | {name: own for name, own in expected.items() if name.startswith("pooler.dense.")}
    for name in sorted(expected.keys() | tensors.keys()):
        ours = tuple(expected[name].shape) if name in expected else "none"
        theirs = tuple(tensors[name].shape) if name in tensors else "none"
        if ours != theirs:
            raise InputError(field, source, f"`{name}` is {theirs}, the config requires {ours}: mend the model section")
    encoder.load_state_dict(tensors)
