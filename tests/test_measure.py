"""Counting FLOPs: right, and without a trace in the numbers that are counted."""

import torch
from torch import nn

from engine.measure import count_flops, matrix_peak


def test_linear_layer_forward_and_backward() -> None:
    layer = nn.Linear(8, 4)
    images = torch.randn(3, 8, requires_grad=True)
    _, forward = count_flops(lambda: layer(images))
    assert forward == 2 * 3 * 8 * 4
    _, both = count_flops(lambda: layer(images).sum().backward())
    assert both == 3 * forward


def test_convolution() -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    _, flops = count_flops(lambda: convolution(torch.randn(2, 3, 8, 8)))
    assert flops == 2 * 2 * 8 * 8 * 5 * 3 * 9


def test_counting_changes_no_bit() -> None:
    """torch's own FlopCounterMode breaks BatchNorm up: a run's counted step had other gradients than an uncounted one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    images = torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    plain = gradients()
    counted, flops = count_flops(gradients)
    assert flops > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


def test_peak_is_a_speed() -> None:
    assert 1e7 < matrix_peak(torch.device("cpu"), torch.float32, size=64, seconds=0.01) < 1e15
