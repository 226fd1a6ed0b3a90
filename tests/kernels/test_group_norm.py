"""The GroupNorm kernel against its definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import group_norm as module
from kernels import reference
from kernels.group_norm import group_norm

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def _case(device: str, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(shape[-1])
    C = shape[-1]
    x = torch.randn(*shape) * (1 + torch.arange(C)) / C + torch.randn(C)
    tensors = (x, torch.randn(C), torch.randn(C))
    return tuple(tensor.to(device, dtype) for tensor in tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 300, 64), 32), ((1, 7, 12), 4), ((3, 130, 96), 2), ((1, 3, 8), 8)])
def test_error_is_at_most_twice_that_of_pytorch(
    device: str, dtype: torch.dtype, silu: bool, shape: tuple[int, ...], groups: int
) -> None:
    x, weight, bias = _case(device, dtype, *shape)
    ours = group_norm(x, weight, bias, groups=groups, eps=EPS, silu=silu)
    assert (ours.shape, ours.dtype) == (x.shape, dtype)
    exact = reference.group_norm(x.double(), weight.double(), bias.double(), groups=groups, eps=EPS, silu=silu)
    plain = reference.group_norm(x, weight, bias, groups=groups, eps=EPS, silu=silu)
    allowed = 2 * (plain - exact).abs().max() + 1e-6
    if device == "cpu" and dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    assert (ours - exact).abs().max() <= allowed


def test_reference_is_torchs_own_on_channels_first() -> None:
    x, weight, bias = _case("cpu", torch.float32, 2, 16, 12)
    images = x.transpose(1, 2).unflatten(2, (4, 4)).contiguous()  # (B, C, 4, 4)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(images, 3, weight, bias, EPS))
    found = reference.group_norm(x, weight, bias, groups=3, eps=EPS, silu=True)
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))


def test_variance_survives_a_large_mean(device: str) -> None:
    x, weight, bias = _case(device, torch.float32, 1, 500, 16)
    x = x + 1e3
    exact = reference.group_norm(x.double(), weight.double(), bias.double(), groups=4, eps=EPS, silu=False)
    found = group_norm(x, weight, bias, groups=4, eps=EPS, silu=False)
    torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=1e-3)


def test_an_image_has_the_same_bits_alone_and_in_any_batch(device: str) -> None:
    x, weight, bias = _case(device, torch.float32, 5, 200, 64)
    whole = group_norm(x, weight, bias, groups=16, eps=EPS, silu=True)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
        assert torch.equal(group_norm(x[rows], weight, bias, groups=16, eps=EPS, silu=True), whole[rows])
    assert group_norm(x[:0], weight, bias, groups=16, eps=EPS, silu=True).shape == (0, 200, 64)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"x": torch.zeros(2, 9, 8, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(9, 8)}, "x"),
        ({"x": torch.zeros(2, 8, 9).transpose(1, 2)}, "x"),
        ({"x": torch.zeros(1, 1, 4104)}, "x"),
        ({"groups": 3}, "groups"),
        ({"weight": torch.zeros(7)}, "weight"),
        ({"weight": torch.zeros(8, requires_grad=True)}, "weight"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias"),
        ({"bias": torch.zeros(16)[::2]}, "bias"),
        ({"bias": torch.zeros(8, device="meta")}, "bias"),
    ],
)
def test_contract_errors_name_the_tensor(changes: dict[str, object], field: str) -> None:
    given = {"x": torch.zeros(2, 9, 8), "weight": torch.zeros(8), "bias": torch.zeros(8), "groups": 4}
    with pytest.raises(ValueError, match=f"^{field}: "):
        group_norm(**(given | changes), eps=EPS, silu=True)  # type: ignore[arg-type]


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.group_norm(*_case("cpu", torch.float32, 2, 9, 8), groups=4, eps=EPS, silu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_published_sizes_have_the_same_bits_in_every_batch_size(dtype: torch.dtype) -> None:
    for C, pixels in ((512, 256), (128, 65536)):
        x, weight, bias = _case("cuda", dtype, 8, pixels, C)
        whole = group_norm(x, weight, bias, groups=32, eps=EPS, silu=True)
        for B in (1, 2, 3, 4):
            assert torch.equal(group_norm(x[8 - B :], weight, bias, groups=32, eps=EPS, silu=True), whole[8 - B :])
