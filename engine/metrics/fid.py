"""Distances between sets of images in features of one network: Fréchet and kernel distance, precision and recall.

    fid = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))      means and covariances of features
    kid = MMD^2 with the kernel (f.f'/H + 1)^3          unbiased; small values may be below 0

The features are those of Inception-v3 where its published weights are given (engine.metrics.inception_features), else what
EfficientNet-Lite0's own classifier reads (engine.metrics.lite0_features), whose FIDs are never to be compared with those of papers:
hence the network in every name. FID also shrinks as samples grow; KID does not.

Sources: Heusel et al. 2017, arXiv:1706.08500; Bińkowski et al. 2018, arXiv:1801.01401; computed by torchmetrics.

B images, H features.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from engine.metrics.features import ImageFeatures, same_network
from engine.metrics.precision_recall import LEAST_FOR_PRECISION, precision_recall

# Fewer images than this on either side give no distance at all. Covariances of fewer than H images are not of full rank
# even so, which adds the same to any two sets of one size: compare with a set of real images as large.
LEAST_FOR_FID = 256
LEAST_FOR_KID = 50
_KID_SUBSETS = 100
_LARGEST_KID_SUBSET = 1000  # torchmetrics' default


def feature_distances(real: ImageFeatures, other: ImageFeatures, *, seed: int = 0) -> dict[str, Any]:
    """Distances of two sets of images; equal arguments give equal numbers.

    Args:
        seed: of the subsets that KID averages over.

    Returns:
        num_real, num_other, num_features, and where both sets are large enough (None otherwise), each with the ending
        `_<network>_features`: fid; kid, kid_std (over subsets); precision, recall (engine.metrics.precision_recall).

    Raises:
        InputError: features of two networks.
    """
    network = same_network(real, other)
    least = min(len(real), len(other))
    mean, deviation = _kid(real.values, other.values, seed) if least >= LEAST_FOR_KID else (None, None)
    precision, recall = precision_recall(real, other) if least >= LEAST_FOR_PRECISION else (None, None)
    found = {
        "fid": _fid(real.values, other.values) if least >= LEAST_FOR_FID else None,
        "kid": mean,
        "precision": precision,
        "recall": recall,
    }
    counts = {"num_real": len(real), "num_other": len(other), "num_features": real.values.shape[1]}
    named = {network.figure(name): value for name, value in found.items()}
    return counts | named | {f"{network.figure('kid')}_std": deviation}


def _fid(real: Tensor, other: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=_Identity(real.shape[1]))
    # Double precision: the difference of two traces of thousands of features loses most digits of a float32.
    metric.update(real.double(), real=True)
    metric.update(other.double(), real=False)
    return float(metric.compute())


def _kid(real: Tensor, other: Tensor, seed: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        metric = KernelInceptionDistance(
            feature=_Identity(real.shape[1]),
            subsets=_KID_SUBSETS,
            subset_size=min(_LARGEST_KID_SUBSET, min(len(real), len(other)) // 2),
        )
    metric.update(real.double(), real=True)
    metric.update(other.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics samples subsets by the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class _Identity(nn.Module):
    """The identity as torchmetrics' feature extractor: the features are extracted already, once for both distances."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
