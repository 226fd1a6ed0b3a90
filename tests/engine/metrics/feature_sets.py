"""Sets of features of a network that is none, for what compares sets."""

import numpy as np
import torch
from torch import Tensor

from engine.metrics.features import FeatureNetwork, ImageFeatures

NETWORK = FeatureNetwork("lite0", "a network of the tests", "0" * 64)


def of(values: Tensor) -> ImageFeatures:
    return ImageFeatures(values, NETWORK)


def normal(count: int, *, seed: int = 0, width: int = 12) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def published_case() -> tuple[ImageFeatures, ImageFeatures]:
    """Real and other features whose FID, precision and recall torch-fidelity 0.4.0 computed, once."""

    def uniform(seed: int, count: int, scale: float, shift: float) -> Tensor:
        values = np.random.RandomState(seed).random_sample((count, 12)) * np.arange(1, 13) / scale + shift
        return torch.from_numpy(values)

    return of(uniform(0, 300, 4, 0.0)), of(uniform(1, 260, 5, 0.3))
