"""The FID network against torch-fidelity's own code (0.4.0, run once on the weights below), its shapes and its resizing."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.models.inception_v3 import _BLOCKS, ConvUnit, InceptionV3, MixedBlock, _Pool, resize_as_tensorflow_1
from engine.models.uninitialised import Uninitialised

# Of torch-fidelity's FeatureExtractorInceptionV3 in float32, every 341st feature and every 168th logit of `_images()`.
FEATURES = [
    [0.0, 4.634564, 9.446507, 0.0, 1.89998, 0.03476],
    [0.0, 4.654304, 9.41735, 0.002103, 1.916468, 0.04471],
]
FEATURE_SUMS = [7544.2714, 7480.0229]
LOGITS = [
    [-17.595808, -6.188329, 11.610966, 15.852104, 19.839767, -8.524952],
    [-17.658958, -6.643861, 11.802326, 15.558021, 19.080046, -8.757425],
]


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    """Uniform weights of a frozen generator, in the order of names, scaled so that activations neither fade nor grow."""
    with Uninitialised():
        network = InceptionV3().eval()
    random = np.random.RandomState(0)
    weights = network.state_dict()
    for name in sorted(name for name in weights if not name.endswith("num_batches_tracked")):
        shape = weights[name].shape
        values = random.random_sample(shape)
        if name.endswith(("running_var", "bn.weight")):
            values = 0.5 + values
        elif name.endswith("conv.weight"):
            values = (2 * values - 1) * math.sqrt(6 / math.prod(shape[1:]))
        else:
            values = 0.2 * values - 0.1
        weights[name].copy_(torch.from_numpy(values.astype(np.float32)))
    return network


def _images() -> Tensor:
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 3, 96, 64)).astype(np.float32))


@torch.no_grad()
def test_features_and_logits_are_those_of_torch_fidelity(network: InceptionV3) -> None:
    features = network(_images())
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features[:, ::341][:, :6], torch.tensor(FEATURES), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.sum(dim=1), torch.tensor(FEATURE_SUMS), rtol=1e-5, atol=0)
    logits = network.logits_without_bias(features)
    torch.testing.assert_close(logits[:, ::168], torch.tensor(LOGITS), rtol=1e-4, atol=1e-3)


def test_parameters_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"), Uninitialised():
        network = InceptionV3()
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 94 * 6 + 2  # 94 convolutions, each with four tensors and a counter of its normalisation
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_6e.branch7x7dbl_5.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool.bn.running_var"] == (192,)
    assert (shapes["fc.weight"], shapes["fc.bias"]) == ((1008, 2048), (1008,))
    sizes = {name: getattr(network, name).out for name in ("Mixed_5b", "Mixed_5c", "Mixed_6a", "Mixed_7a", "Mixed_7c")}
    assert sizes == {"Mixed_5b": 256, "Mixed_5c": 288, "Mixed_6a": 768, "Mixed_7a": 1280, "Mixed_7c": 2048}


def test_average_pools_divide_by_what_lies_inside_and_the_last_block_takes_the_maximum() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    average, maximum, halving = (
        MixedBlock(1, ((pool,),))(x) for pool in (_Pool("average"), _Pool("maximum"), _Pool("maximum", stride=2))
    )
    assert average[0, 0].tolist() == [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]
    assert maximum[0, 0].tolist() == [[4.0, 5.0, 5.0], [7.0, 8.0, 8.0], [7.0, 8.0, 8.0]]
    assert halving.tolist() == [[[[8.0]]]]
    pools = [_BLOCKS[name][-1][0] for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c")]
    assert pools == [_Pool("average")] * 3 + [_Pool("maximum")]


@torch.no_grad()
def test_a_unit_is_convolution_normalisation_and_relu() -> None:
    torch.manual_seed(0)
    unit = ConvUnit(2, 3, kernel=(1, 3)).eval()
    mean, variance = unit.bn.running_mean, unit.bn.running_var
    assert mean is not None
    assert variance is not None
    mean.copy_(torch.randn(3))
    variance.copy_(torch.rand(3) + 0.5)
    unit.bn.weight.copy_(torch.randn(3))
    unit.bn.bias.copy_(torch.randn(3))
    x = torch.randn(1, 2, 4, 5)
    padded = torch.nn.functional.pad(x, (1, 1))
    plain = torch.zeros(1, 3, 4, 5)
    for out in range(3):
        for column in range(5):
            patch = padded[0, :, :, column : column + 3]  # (2, 4, 3)
            plain[0, out, :, column] = (patch * unit.conv.weight[out]).sum(dim=(0, 2))
    shape = (1, 3, 1, 1)
    plain = (plain - mean.view(shape)) / (variance.view(shape) + 1e-3).sqrt()
    plain = (plain * unit.bn.weight.view(shape) + unit.bn.bias.view(shape)).clamp(min=0)
    torch.testing.assert_close(unit(x), plain)


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 9), (11, 7, 5), (8, 8, 8)])
def test_resizing_takes_pixel_i_from_i_times_the_scale(height: int, width: int, size: int) -> None:
    image = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(0)) * 255
    found = resize_as_tensorflow_1(image, size)
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = y - top, x - left
            pixels = image[0, 0]
            above = pixels[top, left] * (1 - across) + pixels[top, right] * across
            under = pixels[below, left] * (1 - across) + pixels[below, right] * across
            assert float(found[0, 0, row, column]) == pytest.approx(float(above * (1 - down) + under * down), abs=2e-3)
