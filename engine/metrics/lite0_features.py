"""What metrics compare instead of pixels: features of a frozen EfficientNet-Lite0 with its ImageNet weights.

    mean and maximum of the head over positions            2 x 1280
    mean and standard deviation of the four taps           2 x (16 + 24 + 40 + 112)

Images of any size are brought to one, so that figures of models of 64, 96 and 256 pixels may be compared. FID, KID and
nearest images use the first 1280, which are what the network's own classifier reads; the independent classifier uses all.

B images, H features.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.efficientnet_lite0 import HEAD_CHANNELS, NUM_POOLED, load_efficientnet_lite0

IMAGE_SIZE = 128
NUM_FEATURES = NUM_POOLED


class Lite0Encoder:
    """EfficientNet-Lite0 as a function from images to features.

    Raises:
        ModuleNotFoundError: its weights' package is not installed (extra `train`).
    """

    def __init__(self, device: torch.device) -> None:
        self._network = load_efficientnet_lite0(field="metrics").requires_grad_(False).to(device)

    @torch.no_grad()
    def encode(self, batches: Iterable[Tensor]) -> Tensor:
        """Features of images.

        Args:
            batches: images (B, 3, any, any) float in [0, 1] on the encoder's device.

        Returns:
            (sum of B, H) float32 on the CPU.
        """
        kept = [torch.empty(0, NUM_FEATURES, dtype=torch.float32, device="cpu")]
        for images in batches:
            if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
                size = (IMAGE_SIZE, IMAGE_SIZE)
                images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
            kept.append(self._network.features(images).pooled().cpu())
        return torch.cat(kept)


def head_mean(features: Tensor) -> Tensor:
    """(B, H) -> (B, 1280), the features that distances of images are measured in."""
    return features[:, :HEAD_CHANNELS]
