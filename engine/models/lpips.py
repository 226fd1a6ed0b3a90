"""LPIPS: perceptual distance of two images in VGG16 features; 14,716,160 parameters, none of them trained here.

The forward pass is our own, over weights from a file, because the `lpips` package and taming's copy need torchvision
and download weights when built. No dropout on the heads: taming's is switched on by Lightning's `.train()`, by
accident.

    d(a, b) = sum over 5 layers of  mean over positions of  w_l . (a_l / |a_l| - b_l / |b_l|)^2

Shapes: B images, S pixels, C_l channels of layer l (64, 128, 256, 512, 512).
Source: Zhang et al. 2018, arXiv:1801.03924, version 0.1; constants of `ScalingLayer` in richzhang/PerceptualSimilarity.
"""

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import InputError

# torchvision's numbering of VGG16 `features`, in stages that end where LPIPS takes features (after the last ReLU):
# (index of convolution, channels in, channels out); a max pool stands before every stage but the first.
_STAGES: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
# Names in published files: torchvision `features.0.weight`; LPIPS and taming `net.slice1.0.weight`, the latter inside
# whole checkpoints as `loss.perceptual_loss.net...`. Heads: taming `lin0.model.1.weight`, lpips also
# `lins.0.model.1.weight`.
_CONVOLUTION = re.compile(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+)\.(weight|bias)$")
_HEAD = re.compile(r"(?:^|\.)(?:lin|lins\.)(\d)\.model\.\d\.weight$")
_SUFFIXES = (".safetensors", ".pth", ".pt")
_FIELD = "loss.perceptual_weights"
_REMEDY = "set loss.perceptual_weights to a file or folder with VGG16 and LPIPS heads, or loss.perceptual to another"


class Lpips(nn.Module):
    """LPIPS distance with frozen weights, random until `load_lpips` sets them.

    State dict: `convolutions.<torchvision index>.{weight,bias}` and `heads.<stage>` (1, C_l, 1, 1).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict(
            {
                str(index): nn.Conv2d(inside, out, 3, padding=1, dtype=torch.float32)
                for stage in _STAGES
                for index, inside, out in stage
            }
        )
        self.heads = nn.ParameterList([torch.rand(1, stage[-1][2], 1, 1, dtype=torch.float32) for stage in _STAGES])
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float32)
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float32)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance per image: two (B, 3, S, S) in [-1, 1], S >= 16 -> (B,). Gradients flow into both."""
        distance = images.new_zeros(len(images))
        for head, a, b in zip(self.heads, self._features(images), self._features(target), strict=True):
            difference = (unit_length(a) - unit_length(b)).square()  # (B, C_l, s, s)
            distance = distance + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (images - self.shift) / self.scale
        features = []
        for number, stage in enumerate(_STAGES):
            if number:
                x = F.max_pool2d(x, kernel_size=2)  # (B, C, s, s) -> (B, C, s/2, s/2)
            for index, _, _ in stage:
                x = F.relu(self.convolutions[str(index)](x))
            features.append(x)
        return features


def load_lpips(path: Path | None) -> Lpips:
    """LPIPS with weights of VGG16 and the LPIPS heads from files.

    Args:
        path: one .safetensors or .pth file with both, or a folder whose such files together hold both
            (torchvision's VGG16 and LPIPS's `vgg.pth`). Other tensors in them, such as VGG's classifier, are ignored.

    Raises:
        InputError: names the path, and the tensor that is missing, doubled or of the wrong shape.
    """
    if path is None:
        raise InputError(_FIELD, "(nothing)", f"loss.perceptual is lpips: {_REMEDY}")
    found: dict[str, Tensor] = {}
    for file in _weight_files(path):
        for name, tensor in _read(file).items():
            key = _own_name(name)
            if key is None:
                continue
            if key in found:
                raise InputError(_FIELD, file, f"`{name}` is there twice: leave one set of weights in {path}")
            found[key] = tensor
    # On the meta device: no 14.7 million random numbers that would be overwritten.
    with torch.device("meta"):
        expected = Lpips().state_dict()
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(_FIELD, path, f"lacks {_theirs(missing[0])} ({len(missing)} tensors missing): {_REMEDY}")
    for name, tensor in found.items():
        if name not in expected or tensor.shape != expected[name].shape:
            wanted = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise InputError(_FIELD, path, f"{_theirs(name)} is {tuple(tensor.shape)}, VGG16 has {wanted}: {_REMEDY}")
    lpips = Lpips()
    lpips.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return lpips.eval()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES) if path.is_dir() else []
    if not files:
        raise InputError(_FIELD, path, f"no such file, or a folder without {', '.join(_SUFFIXES)}: {_REMEDY}")
    return files


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(_FIELD, file, f"cannot be read as plain tensors ({error}): {_REMEDY}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(_FIELD, file, f"holds a {type(content).__name__}, not named tensors: {_REMEDY}")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _own_name(name: str) -> str | None:
    if match := _CONVOLUTION.search(name):
        return f"convolutions.{match[1]}.{match[2]}"
    if match := _HEAD.search(name):
        return f"heads.{match[1]}"
    return None


def _theirs(name: str) -> str:
    """The tensor's name in published files."""
    part, rest = name.split(".", 1)
    return f"`features.{rest}`" if part == "convolutions" else f"`lin{rest}.model.1.weight`"


def unit_length(features: Tensor) -> Tensor:
    """Unit length over channels. sqrt's gradient is infinite at 0, where ReLU leaves whole positions: the epsilon
    under the root keeps it finite; it moves the value by less than the 1e-10 that LPIPS adds to the norm."""
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
