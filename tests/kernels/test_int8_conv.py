"""The 8-bit convolution is exact for its rounded inputs, and rounds them as documented."""

import pytest
import torch
import torch.nn.functional as F

from engine.device import cpu_capabilities
from kernels.int8_conv import Int8Conv, byte_scale, quantise

needs_vnni = pytest.mark.skipif(
    not cpu_capabilities().packs_int8, reason=f"this processor ({cpu_capabilities().isa}) has no VNNI"
)


@needs_vnni
@pytest.mark.parametrize(("C", "K", "H", "W"), [(32, 32, 6, 6), (64, 32, 4, 10), (32, 96, 1, 3)])
@pytest.mark.parametrize("add", [False, True])
def test_equals_the_convolution_of_the_rounded_numbers(C: int, K: int, H: int, W: int, add: bool) -> None:
    torch.manual_seed(C + K)
    # Weights that bytes hold exactly: each output channel's largest is 127 steps.
    steps = torch.randint(-127, 128, (K, C, 3, 3)).double()
    steps[:, 0, 0, 0] = 127
    scales = torch.rand(K).double() + 0.5
    weight, bias = (steps * scales[:, None, None, None]).float(), torch.randn(K)
    x_scale, zero_point = 0.03, 17
    pixels = torch.randint(0, 256, (H, W, C), dtype=torch.uint8)
    padded = F.pad(pixels, (0, 0, 1, 1, 1, 1), value=zero_point)
    real = (pixels.double() - zero_point) * x_scale
    expected = F.conv2d(real.permute(2, 0, 1)[None], weight.double(), bias.double(), padding=1)[0].permute(1, 2, 0)
    out = torch.ones(H, W, K)
    Int8Conv(weight, bias)(padded, out, x_scale=x_scale, zero_point=zero_point, add=add)
    torch.testing.assert_close(out.double(), expected + add, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_vnni
def test_a_channel_without_weights_is_its_bias() -> None:
    out = torch.empty(2, 2, 16)
    padded = torch.full((4, 4, 16), 9, dtype=torch.uint8)
    Int8Conv(torch.zeros(16, 16, 3, 3), torch.arange(16.0))(padded, out, x_scale=1.0, zero_point=3, add=False)
    assert torch.equal(out, torch.arange(16.0).expand(2, 2, 16))


@pytest.mark.parametrize(("lowest", "highest"), [(-0.27, 5.0), (-0.27, -0.1), (0.0, 0.0), (-3.0, 300.0)])
def test_bytes_span_the_range(lowest: float, highest: float) -> None:
    x_scale, zero_point = byte_scale(lowest, highest)
    assert 0 <= zero_point <= 255
    values = torch.linspace(lowest, max(highest, 0.0), 999).view(27, 37)
    found = torch.empty(27, 37, dtype=torch.uint8)
    quantise(values, found, x_scale=x_scale, zero_point=zero_point)
    assert ((found.double() - zero_point) * x_scale - values).abs().max() <= x_scale * 0.51 + 1e-9


def test_rounding_is_to_the_nearest_and_cut_at_the_ends() -> None:
    found = torch.empty(2, 4, dtype=torch.uint8)
    values = torch.tensor([[-9.0, -0.51, -0.49, 0.0], [0.6, 1.4, 250.0, 999.0]])
    quantise(values, found, x_scale=1.0, zero_point=2)
    assert found.tolist() == [[0, 1, 2, 2], [3, 3, 252, 255]]
