"""Winograd's convolution is the convolution: against float64, padded, doubled, added, by rows and whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.winograd import WinogradConv


def _scratch(name: str, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan)  # nothing that a call did not write may be read


def _case(C: int, K: int, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(C + K + H)
    x = F.silu(torch.randn(H, W, C))
    return x, torch.randn(K, C, 3, 3) / (3 * C**0.5), torch.randn(K)


def _expected(x: Tensor, weight: Tensor, bias: Tensor, *, doubled: bool) -> Tensor:
    images = x.permute(2, 0, 1)[None]
    if doubled:
        images = F.interpolate(images, scale_factor=2.0, mode="nearest")
    return F.conv2d(images, weight, bias, padding=1)[0].permute(1, 2, 0)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize(("C", "K", "H", "W"), [(128, 64, 8, 16), (32, 32, 4, 4), (5, 7, 12, 8)])
def test_error_is_of_float32s_size(C: int, K: int, H: int, W: int, doubled: bool) -> None:
    x, weight, bias = _case(C, K, H, W)
    conv = WinogradConv(weight, bias, doubled=doubled)
    out = torch.full((conv.scale * H, conv.scale * W, K), torch.nan)
    conv(F.pad(x, (0, 0, 1, 1, 1, 1)), out, add=False, scratch=_scratch)
    exact = _expected(x.double(), weight.double(), bias.double(), doubled=doubled)
    plain = (_expected(x, weight, bias, doubled=doubled) - exact).square().mean().sqrt()
    error = (out - exact).square().mean().sqrt()
    assert error <= (20 if doubled else 6) * plain  # seen: 8 and 2.5 times; a wrong tap is a million times


@pytest.mark.parametrize("doubled", [False, True])
def test_rows_of_an_image_are_the_images_rows(doubled: bool) -> None:
    x, weight, bias = _case(16, 8, 16, 8)
    conv = WinogradConv(weight, bias, doubled=doubled)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    whole = torch.zeros(conv.scale * 16, conv.scale * 8, 8)
    conv(padded, whole, add=False, scratch=_scratch)
    part = torch.ones(conv.scale * 4, conv.scale * 8, 8)
    conv(padded[4:10], part, add=True, scratch=_scratch)
    torch.testing.assert_close(part - 1, whole[conv.scale * 4 : conv.scale * 8], atol=1e-5, rtol=1e-5)


def test_products_saved() -> None:
    _, weight, bias = _case(4, 4, 4, 4)
    frequencies = [len(WinogradConv(weight, bias, doubled=doubled)._weight) for doubled in (False, True)]
    assert frequencies == [36, 25]  # for the 144 of a direct convolution


@pytest.mark.parametrize(("size", "fits"), [((8, 4), (True, True)), ((6, 6), (False, True)), ((5, 8), (False, False))])
def test_what_fits(size: tuple[int, int], fits: tuple[bool, bool]) -> None:
    assert (WinogradConv.fits(*size), WinogradConv.fits(*size, doubled=True)) == fits
