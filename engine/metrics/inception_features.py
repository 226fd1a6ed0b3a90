"""Features of FID's Inception-v3, in which published figures are: the mean before the classifier, and its logits without bias.

Images are rounded to 8 bits first, as torch-fidelity reads them, and resized by the network as TensorFlow 1 did.

B images, K classes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.metrics.features import FeatureNetwork, ImageFeatures
from engine.models.inception_v3 import NUM_FEATURES, InceptionV3


class InceptionEncoder:
    """An `engine.metrics.features.FeatureEncoder`.

    Args:
        sha256: of the file of weights.
        is_published: the weights are those of published figures; others have another name: their figures are their own.
    """

    def __init__(self, network: InceptionV3, *, sha256: str, is_published: bool, device: torch.device) -> None:
        self._inception = network.to(device)
        title = "Inception-v3 of 2015-12-05, as published" if is_published else "Inception-v3 with other weights"
        self.network = FeatureNetwork("inception" if is_published else "inception_other", title, sha256)

    @torch.no_grad()
    def encode(self, batches: Iterable[Tensor]) -> ImageFeatures:
        """(B, 2048)."""
        kept = [torch.empty(0, NUM_FEATURES, dtype=torch.float32, device="cpu")]
        for images in batches:
            kept.append(self._inception((images.float().clamp(0, 1) * 255).round()).cpu())
        return ImageFeatures(torch.cat(kept), self.network)

    @torch.no_grad()
    def class_logits(self, features: ImageFeatures) -> Tensor:
        """(B, 1008)."""
        weight = self._inception.fc.weight
        return self._inception.logits_without_bias(features.values.to(weight.device)).cpu()
