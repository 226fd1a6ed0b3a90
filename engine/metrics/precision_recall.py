"""Improved precision and recall: how many generations look like photographs, and how many photographs are within reach.

Each set's manifold is the union of balls around its images' features, each as wide as the distance to the image's k-th neighbour:

    precision   share of generations inside the photographs' manifold
    recall      share of photographs inside the generations' manifold

FID confounds the two. With few images the balls are wide and both are too large; they depend on the numbers of both sets, so read
them beside those of as many other photographs.

Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, with k = 3.

B images, H features.
"""

import torch
from torch import Tensor

from engine.metrics.features import ImageFeatures, same_network

NEIGHBOUR = 3
LEAST_FOR_PRECISION = 50  # images on either side, below which there are no manifolds to speak of
_AT_ONCE = 512  # rows of a distance matrix


def precision_recall(real: ImageFeatures, other: ImageFeatures, *, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Precision and recall of `other` with regard to `real`; each has more than `neighbour` images.

    Raises:
        InputError: features of two networks.
    """
    same_network(real, other)
    real_values, other_values = real.values.double(), other.values.double()
    precision = _share_inside(other_values, real_values, _radii(real_values, neighbour))
    recall = _share_inside(real_values, other_values, _radii(other_values, neighbour))
    return precision, recall


def _radii(features: Tensor, neighbour: int) -> Tensor:
    """(B,) squared distances of each image to its k-th neighbour; the nearest of all is the image itself."""
    parts = [_squared(part, features).kthvalue(neighbour + 1).values for part in features.split(_AT_ONCE)]
    return torch.cat(parts)


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    parts = [(_squared(part, centres) <= radii).any(dim=1) for part in features.split(_AT_ONCE)]
    return float(torch.cat(parts).double().mean())


def _squared(some: Tensor, to: Tensor) -> Tensor:
    """Squared distances, (B, B'). In double precision, so that the matrix product's rounding decides nothing."""
    return (some.square().sum(dim=1)[:, None] + to.square().sum(dim=1) - 2 * some @ to.T).clamp(min=0)
