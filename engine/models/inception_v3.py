"""Inception-v3 as FID and the Inception Score are defined on it: TensorFlow's graph of 2015-12-05, not torchvision's network.

23,850,960 parameters beside the statistics of the batch normalisations. Weights come from a file
(engine.interop.inception_reader); names of tensors are those of that file. What differs from torchvision's network of the same name,
and moves a FID by whole points:

    1008 classes in place of 1000, and no auxiliary classifier
    average pools divide by what lies inside the image, not by 9
    the last block, Mixed_7c, has a maximum pool where all others have an average
    images are resized as TensorFlow 1 did: pixel i of n comes from i * size / n, without half-pixel centres or antialiasing
    (x - 128) / 128 of values 0 ... 255, not the mean and deviation of ImageNet

```
images 0...255 -> 299 x 299 -> stem -> Mixed_5 x 3 -> Mixed_6 x 5 -> Mixed_7 x 3 -> mean -> fc without its bias
 (B,3,any,any)                 192,35      288,35        768,17        2048,8      (B,2048)      (B,1008)
```

B images, C channels.
Sources: Szegedy et al. 2015, arXiv:1512.00567; the graph as torch-fidelity and pytorch-fid publish it, both Apache-2.0.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008

_BATCH_NORM_EPS = 1e-3


class _Unit(NamedTuple):
    """A convolution with its normalisation. Padding keeps the size, unless the stride is 2."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class _Pool(NamedTuple):
    """A pool of 3 x 3; padding as of a unit."""

    kind: str  # average, maximum
    stride: int = 1


_Step = _Unit | _Pool | tuple[_Unit, ...]  # several units: of the same input, their outputs side by side
_Branch = tuple[_Step, ...]
_AVERAGE, _MAXIMUM, _HALVING = _Pool("average"), _Pool("maximum"), _Pool("maximum", stride=2)


def _block_a(pooled: int) -> tuple[_Branch, ...]:
    return (
        (_Unit("branch1x1", 64),),
        (_Unit("branch5x5_1", 48), _Unit("branch5x5_2", 64, (5, 5))),
        (_Unit("branch3x3dbl_1", 64), _Unit("branch3x3dbl_2", 96, (3, 3)), _Unit("branch3x3dbl_3", 96, (3, 3))),
        (_AVERAGE, _Unit("branch_pool", pooled)),
    )


def _block_b() -> tuple[_Branch, ...]:
    return (
        (_Unit("branch3x3", 384, (3, 3), 2),),
        (_Unit("branch3x3dbl_1", 64), _Unit("branch3x3dbl_2", 96, (3, 3)), _Unit("branch3x3dbl_3", 96, (3, 3), 2)),
        (_HALVING,),
    )


def _block_c(inner: int) -> tuple[_Branch, ...]:
    wide, tall = (1, 7), (7, 1)
    return (
        (_Unit("branch1x1", 192),),
        (_Unit("branch7x7_1", inner), _Unit("branch7x7_2", inner, wide), _Unit("branch7x7_3", 192, tall)),
        (
            _Unit("branch7x7dbl_1", inner), _Unit("branch7x7dbl_2", inner, tall), _Unit("branch7x7dbl_3", inner, wide),
            _Unit("branch7x7dbl_4", inner, tall), _Unit("branch7x7dbl_5", 192, wide),
        ),
        (_AVERAGE, _Unit("branch_pool", 192)),
    )  # fmt: skip


def _block_d() -> tuple[_Branch, ...]:
    return (
        (_Unit("branch3x3_1", 192), _Unit("branch3x3_2", 320, (3, 3), 2)),
        (
            _Unit("branch7x7x3_1", 192), _Unit("branch7x7x3_2", 192, (1, 7)), _Unit("branch7x7x3_3", 192, (7, 1)),
            _Unit("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (_HALVING,),
    )  # fmt: skip


def _block_e(pool: _Pool) -> tuple[_Branch, ...]:
    return (
        (_Unit("branch1x1", 320),),
        (_Unit("branch3x3_1", 384), (_Unit("branch3x3_2a", 384, (1, 3)), _Unit("branch3x3_2b", 384, (3, 1)))),
        (
            _Unit("branch3x3dbl_1", 448), _Unit("branch3x3dbl_2", 384, (3, 3)),
            (_Unit("branch3x3dbl_3a", 384, (1, 3)), _Unit("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, _Unit("branch_pool", 192)),
    )  # fmt: skip


_BLOCKS = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(), "Mixed_7b": _block_e(_AVERAGE), "Mixed_7c": _block_e(_MAXIMUM),
}  # fmt: skip


class InceptionV3(nn.Module):
    """The network with random weights; see engine.interop.inception_reader. Meant for eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, kernel=(3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, kernel=(3, 3), padding=(0, 0))
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, kernel=(3, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, kernel=(3, 3), padding=(0, 0))
        channels = 192
        for name, branches in _BLOCKS.items():
            block = MixedBlock(channels, branches)
            self.add_module(name, block)
            channels = block.out
        self.fc = nn.Linear(channels, NUM_CLASSES, dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """The features of FID: (B, 3, any, any) float of whole numbers 0 to 255 -> (B, 2048)."""
        x = (resize_as_tensorflow_1(images, IMAGE_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def logits_without_bias(self, features: Tensor) -> Tensor:
        """What the Inception Score takes the softmax of: (B, 2048) -> (B, 1008). The published graph adds no bias."""
        return features @ self.fc.weight.T


class MixedBlock(nn.Module):
    """Branches of one input, their outputs side by side; `out` is the number of channels."""

    def __init__(self, inside: int, branches: tuple[_Branch, ...]) -> None:
        super().__init__()
        self._branches = branches
        self.out = 0
        for branch in branches:
            channels = inside
            for step in branch:
                if not isinstance(step, _Pool):
                    units = (step,) if isinstance(step, _Unit) else step
                    for unit in units:
                        self.add_module(unit.name, ConvUnit(channels, unit.out, kernel=unit.kernel, stride=unit.stride))
                    channels = sum(unit.out for unit in units)
            self.out += channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, out, h, w), or halves of h and w."""
        found = []
        for branch in self._branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            found.append(y)
        return torch.cat(found, dim=1)

    def _step(self, step: _Step, x: Tensor) -> Tensor:
        if isinstance(step, _Unit):
            found: Tensor = self.get_submodule(step.name)(x)
            return found
        if not isinstance(step, _Pool):
            return torch.cat([self.get_submodule(unit.name)(x) for unit in step], dim=1)
        if step.kind == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=step.stride, padding=1 if step.stride == 1 else 0)


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU: (B, C, h, w) -> (B, C', h', w').

    Args:
        padding: None: the size stays with stride 1; none with stride 2.
    """

    def __init__(
        self,
        inside: int,
        out: int,
        *,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
        options: dict[str, Any] = {"stride": stride, "padding": padding, "bias": False, "dtype": torch.float32}
        self.conv = nn.Conv2d(inside, out, kernel, **options)
        self.bn = nn.BatchNorm2d(out, eps=_BATCH_NORM_EPS, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize_as_tensorflow_1(images: Tensor, size: int) -> Tensor:
    """Bilinear resizing to size x size as TensorFlow 1's `resize_bilinear` with align_corners false.

    Args:
        images: (B, C, any, any) float.
    """
    found = _resized(images, size, dim=3)
    return _resized(found, size, dim=2)


def _resized(images: Tensor, size: int, *, dim: int) -> Tensor:
    """Between the two nearest along one side; the last pixel is repeated."""
    length = images.shape[dim]
    scale = torch.tensor(length / size, dtype=torch.float32, device=images.device)
    places = torch.arange(size, dtype=torch.float32, device=images.device) * scale
    low = places.long()
    high = (low + 1).clamp(max=length - 1)
    share = (places - low).view(-1, *[1] * (3 - dim))
    before, after = images.index_select(dim, low), images.index_select(dim, high)
    return before + (after - before) * share
