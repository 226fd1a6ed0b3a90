"""KoCLIP's encoders: EfficientNet or EfficientNet-Lite0 for images, RoBERTa for captions; built, initialised, loaded.

`efficientnet` is transformers', RoBERTa is engine.models.roberta; both are of any size, and start from nothing or from a Hugging Face
folder. `efficientnet-lite0` has one size and starts from ImageNet weights that a package brings (engine.models.efficientnet_lite0).

B images, S pixels, H features an image or a cell, P cells of an image.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.ranker import KoclipConfig
from engine.errors import InputError
from engine.models.efficientnet_lite0 import (
    CELL_STRIDE,
    NUM_OF_CELL,
    NUM_POOLED,
    EfficientNetLite0,
    load_efficientnet_lite0,
)
from engine.models.environment import check_torchvision
from engine.models.roberta import Roberta

if TYPE_CHECKING:
    # Only here: transformers takes seconds to import, and is imported after check_torchvision(), so that a broken torchvision is named.
    from transformers import EfficientNetConfig, EfficientNetModel

_EFFICIENTNET_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_EFFICIENTNET_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_EFFICIENTNET_CELL = 32  # pixels a side of a position of its last layer
_MOMENTUM, _BATCH_NORM_EPS = 0.1, 1e-5  # torch's defaults


class Lite0ImageEncoder(nn.Module):
    """EfficientNet-Lite0 and what is pooled of it (`Lite0Features.pooled`), standardised.

    Args:
        cells: features of each cell instead (`Lite0Features.cells`).
    """

    feature_mean: Tensor
    feature_variance: Tensor

    def __init__(self, *, cells: bool = False) -> None:
        super().__init__()
        self.cells = cells
        self.momentum = _MOMENTUM
        self.network = EfficientNetLite0(classifier=False)
        # Running statistics: levels differ in size by a factor of 50, and a head's maximum is not a tap's mean.
        features = NUM_OF_CELL if cells else NUM_POOLED
        self.register_buffer("feature_mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("feature_variance", torch.ones(features, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 in [0, 1], S >= 32 -> (B, 2944) or (B, P, 1552) float32, standardised as by BatchNorm."""
        found = self.network.features(images)
        # Not nn.BatchNorm1d, which takes no float32 features in a model that was cast to bfloat16.
        mean, variance = self.feature_mean.float(), self.feature_variance.float()
        if not self.cells:
            return F.batch_norm(found.pooled(), mean, variance, training=self.training, momentum=self.momentum)
        cells = found.cells()
        if not self.training:  # spelt out: the exporter to ONNX does not see how many features a cell has
            return (cells - mean) / (variance + _BATCH_NORM_EPS).sqrt()
        rows = cells.flatten(0, 1)
        rows = F.batch_norm(rows, mean, variance, training=True, momentum=self.momentum, eps=_BATCH_NORM_EPS)
        return rows.view_as(cells)


# ----------------------------------------------------------------------------------------------------------- building


def image_features(config: KoclipConfig) -> int:
    """H: how many features the image encoder of a config makes of an image, or of each cell with `token_similarity`."""
    if config.image_encoder != "efficientnet-lite0":
        return config.image_hidden_dim
    return NUM_OF_CELL if config.token_similarity else NUM_POOLED


def num_cells(config: KoclipConfig) -> int:
    """P: cells that the image encoder of a config divides an image into."""
    cell = CELL_STRIDE if config.image_encoder == "efficientnet-lite0" else _EFFICIENTNET_CELL
    return math.ceil(config.image_size / cell) ** 2


def build_image_encoder(config: KoclipConfig) -> "EfficientNetModel | Lite0ImageEncoder":
    """The image encoder of a config, random weights."""
    if config.image_encoder == "efficientnet-lite0":
        return Lite0ImageEncoder(cells=config.token_similarity)
    return _build_efficientnet(config)


@contextlib.contextmanager
def statistics_kept(encoder: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of an image encoder alone within the block, which sees other images than ranking will."""
    normed = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d | Lite0ImageEncoder)]
    before = [part.momentum for part in normed]
    for part in normed:
        part.momentum = 0.0
    try:
        yield
    finally:
        for part, momentum in zip(normed, before, strict=True):
            part.momentum = momentum


def efficientnet_width(width: float) -> int:
    """Pooled channels of EfficientNet at a width coefficient: 1280 scaled, to a multiple of 8. B0 (1.0): 1280."""
    scaled = 1280 * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


def _build_efficientnet(config: KoclipConfig) -> "EfficientNetModel":
    check_torchvision()
    from transformers import EfficientNetModel

    made = efficientnet_width(config.image_width)
    if config.image_hidden_dim != made:
        raise InputError(
            "image_hidden_dim",
            config.image_hidden_dim,
            f"an EfficientNet of width {config.image_width} makes {made} features: write image_hidden_dim: {made}",
        )
    encoder = EfficientNetModel(_efficientnet_config(config)).float()  # transformers builds in the default dtype
    if config.similarity == "published":
        _as_in_timm(encoder)
    _initialise_efficientnet(encoder)
    return encoder


def _efficientnet_config(config: KoclipConfig) -> "EfficientNetConfig":
    from transformers import EfficientNetConfig

    published_size = config.image_width >= 1 and config.image_depth >= 1
    num_blocks = sum(math.ceil(config.image_depth * repeats) for repeats in _EFFICIENTNET_REPEATS)
    as_in_timm = config.similarity == "published"
    return EfficientNetConfig(
        image_size=config.image_size,
        width_coefficient=config.image_width,
        depth_coefficient=config.image_depth,
        hidden_dim=config.image_hidden_dim,
        batch_norm_eps=1e-5 if as_in_timm else 1e-3,
        depthwise_padding=(
            list(range(num_blocks)) if as_in_timm else _odd_strided_blocks(config.image_size, config.image_depth)
        ),
        # Keras defines momentum the other way round: 0.99 there is 0.01 in torch, but transformers passes 0.99 to
        # torch, so that evaluation would use the statistics of the last batch only (a tiny KoCLIP, trained to a loss
        # of 1.66, evaluated to 2.09 so, and to 1.85 with torch's own default of 0.1).
        batch_norm_momentum=0.1,
        # Regularisation for training long on much data; a small encoder on small data underfits with it.
        drop_connect_rate=0.2 if published_size else 0.0,
    )


def _as_in_timm(encoder: "EfficientNetModel") -> None:
    """The rest of what KoCLIP's EfficientNet, timm's `efficientnet_b0`, computes otherwise than TensorFlow's.

    It pads on both sides, and has a residual wherever a block keeps its size, a stage's first block included (which none does
    at the published widths). With TensorFlow's constants embeddings of original checkpoints are off by up to 5.5e-2.
    """
    encoder.embeddings.padding = nn.ZeroPad2d(1)
    for block in encoder.encoder.blocks:
        entry = block.expansion.expand_conv if block.expand else block.depthwise_conv.depthwise_conv
        keeps_size = (
            block.depthwise_conv.stride == 1 and entry.in_channels == block.projection.project_conv.out_channels
        )
        block.projection.apply_dropout = keeps_size


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


def build_text_encoder(config: KoclipConfig) -> Roberta:
    """The text encoder of a config, random weights."""
    if config.text_dim % config.text_heads:
        raise InputError("text_dim", config.text_dim, f"must be divisible by text_heads ({config.text_heads})")
    # [CLS] is used without the pooling layer. Original checkpoints hold it all the same; frozen, it costs memory only,
    # and no optimiser or data-parallel engine waits for its gradient.
    original = config.similarity == "published"
    encoder = Roberta(config, pooled=original)
    if original:
        encoder.pooler.requires_grad_(False)
    return encoder


# ------------------------------------------------------------------------------------------------------------ loading


def load_pretrained_encoders(
    text_encoder: nn.Module, image_encoder: nn.Module, *, text_source: str | None, image_source: str | None
) -> None:
    """See `KoClip.from_pretrained_encoders`."""
    if text_source is not None:
        field = "pretrained_text_encoder"
        _load_into(text_encoder, _fetch("roberta", text_source, field=field), text_source, field=field)
    if isinstance(image_encoder, Lite0ImageEncoder):
        image_encoder.network = load_efficientnet_lite0(field="model.image_encoder")
    elif image_source is not None:
        field = "pretrained_image_encoder"
        _load_into(image_encoder, _fetch("efficientnet", image_source, field=field), image_source, field=field)


def _fetch(kind: Literal["roberta", "efficientnet"], source: str, *, field: str) -> dict[str, Tensor]:
    """Tensors of a Hugging Face model, name or folder. Safetensors only; never runs code from the repository."""
    check_torchvision()
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
