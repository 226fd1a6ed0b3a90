"""Features of EfficientNet-Lite0: what they are made of, the same for any batch and any size of image."""

import pytest
import torch
import torch.nn.functional as F

from engine.metrics.features import FeatureEncoder
from engine.metrics.lite0_features import IMAGE_SIZE, LITE0, NUM_FEATURES, Lite0Encoder, Lite0HeadEncoder, head_mean
from engine.models.efficientnet_lite0 import load_efficientnet_lite0

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> Lite0Encoder:
    return Lite0Encoder(CPU)


def smooth_images(count: int, size: int) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (size, size), mode="bilinear")


def test_features_are_means_maxima_and_deviations(encoder: Lite0Encoder) -> None:
    images = smooth_images(3, IMAGE_SIZE)
    found = encoder.encode(images.split(2))
    assert (found.shape, found.dtype) == ((3, NUM_FEATURES), torch.float32)
    with torch.no_grad():
        whole = load_efficientnet_lite0(field="x").features(images)
    assert torch.allclose(head_mean(found), whole.head.mean(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(found[:, 1280:2560], whole.head.amax(dim=(2, 3)), atol=1e-4)
    first = whole.taps[0].flatten(2)
    assert torch.allclose(found[:, 2560:2592], torch.cat([first.mean(2), first.std(2, correction=0)], 1), atol=2e-3)
    assert encoder.encode([]).shape == (0, NUM_FEATURES)


def test_images_of_other_sizes_are_brought_to_one(encoder: Lite0Encoder) -> None:
    """The same picture at another size is nearer to itself than to another picture."""
    small, own = encoder.encode([smooth_images(2, 96)]), encoder.encode([smooth_images(2, IMAGE_SIZE)])
    apart = torch.cdist(head_mean(small), head_mean(own))
    assert apart[0, 0] < apart[0, 1]
    assert apart[1, 1] < apart[1, 0]


def test_the_head_has_the_features_of_distances_and_imagenets_logits(encoder: Lite0Encoder) -> None:
    images = smooth_images(3, IMAGE_SIZE)
    own: FeatureEncoder = Lite0HeadEncoder(CPU)
    features = own.encode(images.split(2))
    assert (features.network, features.network.figure("fid")) == (LITE0, "fid_lite0_features")
    assert torch.equal(features.values, head_mean(encoder.encode(images.split(2))))
    with torch.no_grad():
        whole = load_efficientnet_lite0(field="x", classifier=True)(images)
    assert torch.allclose(own.class_logits(features), whole, atol=1e-3)
