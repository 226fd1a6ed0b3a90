"""The perceptual distance of a config, its formula on Lite0 features, and the windows that it sees."""

import pytest
import torch
from torch import Tensor

from engine.config.stages import VqganLossConfig
from engine.models.efficientnet_lite0 import load_efficientnet_lite0
from engine.models.perceptual import Lite0Distance, perceptual_from_config, shifted_windows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def distance() -> Lite0Distance:
    built = perceptual_from_config(VqganLossConfig(perceptual="efficientnet-lite0"), CPU)
    assert isinstance(built, Lite0Distance)
    return built


def test_none_is_none() -> None:
    assert perceptual_from_config(VqganLossConfig(perceptual="none"), CPU) is None


def test_it_is_the_sum_of_squared_differences_of_unit_features(distance: Lite0Distance) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    network = load_efficientnet_lite0(field="x")
    expected = torch.zeros(2)
    for x, y in zip(network.features((a + 1) / 2).taps, network.features((b + 1) / 2).taps, strict=True):
        cosines = torch.cosine_similarity(x, y, dim=1)  # |u - v|^2 = 2 - 2 cos of unit vectors
        expected += (2 - 2 * cosines).mean(dim=(1, 2))
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-5)
    assert distance(a, a).abs().max() == 0


def test_gradients_flow_into_the_images_alone(distance: Lite0Distance) -> None:
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)  # even ground: features may all be alike
    distance(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    target = torch.rand(1, 3, 32, 32, requires_grad=True)
    distance(torch.rand(1, 3, 32, 32), target).sum().backward()
    assert target.grad is not None
    assert target.grad.abs().max() > 0


def test_it_sees_blur_where_pixels_do_not(distance: Lite0Distance) -> None:
    """Two errors of equal mean square: a blurred pattern is further from the original than an even change of light."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 64, 64, generator=generator) - 0.5
    blurred = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2)
    light = (blurred - image).square().mean().sqrt()
    assert distance(blurred, image) > 3 * distance(image + light, image)


def test_windows_are_the_same_of_both_and_follow_the_seed() -> None:
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)
    seen = set()
    for seed in range(200):
        window, target = shifted_windows(images, -images, largest=3, seed=seed)
        assert window.shape == (2, 3, 13, 13)
        assert torch.equal(window, -target)
        again, _ = shifted_windows(images, images, largest=3, seed=seed)
        assert torch.equal(again, window)
        seen.add(int(window[0, 0, 0, 0]))
    assert seen == {16 * top + left for top in range(4) for left in range(4)}
    same: tuple[Tensor, Tensor] = shifted_windows(images, images, largest=0, seed=1)
    assert same[0] is images
