"""The perceptual part of VQGAN training: which distance, and where it looks.

`lpips` is the published one; its VGG16 weights must be brought. `efficientnet-lite0` needs none but an installed package, and
is the sum over four levels l of

    mean over positions of |a_l / |a_l| - b_l / |b_l||^2        (channels of one position as one vector)

which is LPIPS without its learned heads, on the features at strides 2, 4, 8 and 16.

Shapes: B images, S pixels.
Source: Zhang et al. 2018, arXiv:1801.03924; engine.models.efficientnet_lite0 for the features.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from engine.config.stages import VqganLossConfig
from engine.models.efficientnet_lite0 import EfficientNetLite0, load_efficientnet_lite0
from engine.models.lpips import load_lpips, unit_length


class PerceptualDistance(Protocol):
    """Distance per image: two (B, 3, S, S) in [-1, 1] -> (B,). Gradients flow into both; its weights stay."""

    def __call__(self, images: Tensor, target: Tensor, /) -> Tensor: ...


class Lite0Distance(nn.Module):
    """Distance in the features of a frozen EfficientNet-Lite0."""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Two (B, 3, S, S) in [-1, 1], S >= 32 -> (B,)."""
        distance = images.new_zeros(len(images))
        with torch.set_grad_enabled(target.requires_grad and torch.is_grad_enabled()):
            target_taps = self.network.taps((target + 1) / 2)
        for a, b in zip(self.network.taps((images + 1) / 2), target_taps, strict=True):
            distance = distance + (unit_length(a) - unit_length(b)).square().sum(dim=1).mean(dim=(1, 2))
        return distance


def perceptual_from_config(config: VqganLossConfig, device: torch.device) -> PerceptualDistance | None:
    """The perceptual distance of a loss section; None for `none`.

    Raises:
        InputError: its weights are not there, or do not fit.
    """
    if config.perceptual == "none":
        return None
    if config.perceptual == "lpips":
        return load_lpips(config.perceptual_weights).to(device)
    return Lite0Distance(load_efficientnet_lite0(field="loss.perceptual")).to(device)


def shifted_windows(images: Tensor, target: Tensor, *, largest: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same window of both, `largest` pixels smaller than the images and at a random place.

    A network that halves its maps sees each pixel from one fixed phase; what it cannot see there stays in the images as a
    faint grid. Windows move the phase from step to step.

    Args:
        images: (B, 3, S, S).
        target: (B, 3, S, S).
        largest: 0: the images as they are.
        seed: decides the place; the training step.

    Returns:
        two (B, 3, S - largest, S - largest), views.
    """
    if largest == 0:
        return images, target
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, largest + 1, (2,), generator=generator, dtype=torch.int64).tolist()
    height, width = images.shape[2] - largest, images.shape[3] - largest
    window = (..., slice(top, top + height), slice(left, left + width))
    return images[window], target[window]
