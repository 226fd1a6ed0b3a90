"""Inception's features through the encoder: rounding, batches, names; logits for its score."""

import pytest
import torch
from torch import Tensor, nn

from engine.metrics.features import FeatureEncoder
from engine.metrics.inception_features import InceptionEncoder


class Small(nn.Module):
    """In place of the network, which has a test of its own: means of quarters, the first of which decide a class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        assert torch.equal(images, images.round())
        assert images.max() > 1
        pooled = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.cat([pooled, pooled.new_zeros(len(pooled), 2048 - 12)], dim=1)

    def logits_without_bias(self, features: Tensor) -> Tensor:
        return features[:, :12] @ self.fc.weight.T


def encoder(*, is_published: bool) -> InceptionEncoder:
    torch.manual_seed(0)
    return InceptionEncoder(Small(), sha256="a" * 64, is_published=is_published, device=torch.device("cpu"))  # type: ignore[arg-type]


def test_images_are_rounded_to_8_bits_and_batches_do_not_matter() -> None:
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    own: FeatureEncoder = encoder(is_published=True)
    whole, parts = own.encode([images]), own.encode(images.split(2))
    assert whole.values.shape == (5, 2048)
    assert torch.equal(whole.values, parts.values)
    rounded = own.encode([(images * 255).round() / 255])
    assert torch.equal(rounded.values, whole.values)
    logits = own.class_logits(whole)
    weight = own._inception.fc.weight  # type: ignore[attr-defined]
    assert torch.allclose(logits, whole.values[:, :12] @ weight.T)
    assert len(own.encode([])) == 0


@pytest.mark.parametrize(
    ("is_published", "name"), [(True, "fid_inception_features"), (False, "fid_inception_other_features")]
)
def test_only_the_published_weights_have_the_published_name(is_published: bool, name: str) -> None:
    network = encoder(is_published=is_published).network
    assert network.figure("fid") == name
    assert ("published" in network.title) == is_published
