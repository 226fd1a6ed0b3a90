"""Features of images, and which network they are of: figures of two networks are never mixed.

A FID of 20 in Inception's features and one of 20 in EfficientNet-Lite0's say nothing about each other, and neither do those of two sets
of Inception weights. So features carry their network, what compares two sets of them refuses those of different ones, and each
figure's name ends in its network's: `fid_lite0_features`, `fid_inception_features`.

B images, H features, K classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import InputError


@dataclass(frozen=True)
class FeatureNetwork:
    """A network with its weights.

    Attributes:
        name: in the names of figures: `<figure>_<name>_features`.
        title: for people.
        weights: digest of its weights.
    """

    name: str
    title: str
    weights: str

    def figure(self, name: str) -> str:
        """The full name of a figure in these features."""
        return f"{name}_{self.name}_features"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, (B, H) float32 on the CPU, of one network."""

    values: Tensor
    network: FeatureNetwork

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, numbers: Sequence[int] | slice) -> "ImageFeatures":
        """Those of some of the images."""
        return ImageFeatures(self.values[numbers if isinstance(numbers, slice) else list(numbers)], self.network)


class FeatureEncoder(Protocol):
    """A network as a function from images to the features that distances are measured in."""

    @property
    def network(self) -> FeatureNetwork: ...

    def encode(self, batches: Iterable[Tensor]) -> ImageFeatures:
        """Features of images (B, 3, any, any), float in [0, 1] on the encoder's device, of all batches in order."""
        ...

    def class_logits(self, features: ImageFeatures) -> Tensor:
        """What the Inception Score takes the softmax of: (B, K) on the CPU."""
        ...


def same_network(*features: ImageFeatures) -> FeatureNetwork:
    """The network of all of them.

    Raises:
        InputError: there are several.
    """
    first = features[0].network
    for other in features[1:]:
        if other.network != first:
            named = [f"{network.title} (weights {network.weights[:8]})" for network in (first, other.network)]
            raise InputError("features", " and ".join(named), "cannot be compared: compute both sets with one network")
    return first


def joined(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """One set of several, at least one, of one network. Raises InputError: of several networks."""
    return ImageFeatures(torch.cat([part.values for part in parts]), same_network(*parts))
