"""Fréchet and kernel distances between sets of pictures, in the features of the model's own KoCLIP.

    fid = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))      means and covariances of features
    kid = MMD^2 with the kernel (f.f'/H + 1)^3          unbiased; small ones may come out below 0

The features are what KoCLIP's image encoder pools, H numbers a picture, in place of Inception's, whose weights would
have to be fetched and which never saw the pictures' domain. Hence `koclip_features` in the names: these numbers compare
models that share a KoCLIP, never with FIDs of papers. FID also shrinks as samples grow; KID does not.

Sources: Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401; computed by torchmetrics.

B pictures, H features (EfficientNet-B0: 1280).
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from engine.models.koclip import KoClip

# Fewer pictures than this on either side give no distance at all. Covariances of fewer than H pictures are not of full
# rank even so, which adds the same to any two sets of one size: compare with a set of real pictures as large.
LEAST_FOR_FID = 256
LEAST_FOR_KID = 50
_KID_SUBSETS = 100
_LARGEST_KID_SUBSET = 1000  # torchmetrics' default


@torch.no_grad()
def koclip_features(koclip: KoClip, batches: Iterable[Tensor]) -> Tensor:
    """Pooled features of pictures.

    Args:
        koclip: in eval mode.
        batches: pictures (B, 3, any, any) float in [0, 1], at least one batch, on its device.

    Returns:
        (sum of B, H) float32 on the CPU.
    """
    kept: list[Tensor] = []
    # The projection's input: taken on the way, so that pictures are prepared as KoCLIP itself prepares them.
    hook = koclip.image_projection.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().cpu()))
    try:
        for images in batches:
            koclip.embed_images(images)
    finally:
        hook.remove()
    return torch.cat(kept)


def feature_distances(real: Tensor, other: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Distances of two sets of features; equal arguments give equal numbers.

    Args:
        real: (B, H) float.
        other: (B', H) float.
        seed: of the subsets that KID averages over.

    Returns:
        num_real, num_other, num_features, and where both sets are large enough (None otherwise):
        fid_koclip_features; kid_koclip_features, kid_koclip_features_std (over subsets).
    """
    least = min(len(real), len(other))
    found: dict[str, Any] = {"num_real": len(real), "num_other": len(other), "num_features": real.shape[1]}
    found["fid_koclip_features"] = _fid(real, other) if least >= LEAST_FOR_FID else None
    mean, deviation = _kid(real, other, seed) if least >= LEAST_FOR_KID else (None, None)
    found["kid_koclip_features"], found["kid_koclip_features_std"] = mean, deviation
    return found


def _fid(real: Tensor, other: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1]))
    # Double precision: the difference of two traces of thousands of features loses most digits of a float32.
    metric.update(real.double(), real=True)
    metric.update(other.double(), real=False)
    return float(metric.compute())


def _kid(real: Tensor, other: Tensor, seed: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        metric = KernelInceptionDistance(
            feature=_AsTheyAre(real.shape[1]),
            subsets=_KID_SUBSETS,
            subset_size=min(_LARGEST_KID_SUBSET, min(len(real), len(other)) // 2),
        )
    metric.update(real.double(), real=True)
    metric.update(other.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws subsets from the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class _AsTheyAre(nn.Module):
    """The extractor that torchmetrics asks for: our features are extracted already, once for both distances."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
