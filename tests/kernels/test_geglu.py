"""The GEGLU kernel against its definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import geglu as module
from kernels import reference
from kernels.geglu import geglu

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 64), (3, 26), (2, 1, 2), (1, 2, 4100), (6,)])
def test_error_is_at_most_twice_that_of_pytorch(
    device: str, dtype: torch.dtype, with_bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(*shape) * 3).to(device, dtype)
    bias = torch.randn(shape[-1]).to(device, dtype) if with_bias else None
    ours = geglu(x, bias)
    assert ours.dtype == dtype
    assert ours.shape == (*shape[:-1], shape[-1] // 2)
    exact = reference.geglu(x.double() if bias is None else x.double() + bias.double())
    theirs = reference.geglu(x if bias is None else x + bias)
    allowed = 2 * (theirs - exact).abs().max() + 1e-7
    if device == "cpu" and dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    assert (ours - exact).abs().max() <= allowed


def test_extreme_gates(device: str) -> None:
    gates = torch.tensor([0.0, -0.0, 1e4, -1e4, 30.0, -30.0, 1e-30, -1e-30], device=device)
    x = torch.cat([torch.full_like(gates, 3.0), gates])
    torch.testing.assert_close(geglu(x), reference.geglu(x))


@pytest.mark.parametrize("inner", [32, 33])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(device: str, inner: int) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(5, 2 * inner, device=device), torch.randn(2 * inner, device=device)
    whole = geglu(x, bias)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
        assert torch.equal(geglu(x[rows], bias), whole[rows])


def test_strided_rows_and_nothing_overwritten(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(2, 6, 50, device=device)
    before = wide.clone()
    for view in (wide[:, ::2], wide[..., 3:33], wide[:, :, :40], wide.transpose(0, 1)):
        ours = geglu(view)
        assert torch.equal(ours, geglu(view.clone(memory_format=torch.contiguous_format)))
        assert ours.is_contiguous()
    assert torch.equal(wide, before)
    assert geglu(wide[:0]).shape == (0, 6, 25)


@pytest.mark.parametrize(
    ("x", "bias", "field"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), None, "x"),
        (torch.zeros(2, 7), None, "x"),
        (torch.tensor(1.0), None, "x"),
        (torch.zeros(8, 2).t(), None, "x"),
        (torch.zeros(2, 8, requires_grad=True), None, "x"),
        (torch.zeros(2, 8), torch.zeros(4), "bias"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.float16), "bias"),
        (torch.zeros(2, 8), torch.zeros(16)[::2], "bias"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), "bias"),
    ],
)
def test_contract_errors_name_the_tensor(x: Tensor, bias: Tensor | None, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        geglu(x, bias)


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.geglu(torch.zeros(2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_published_size_has_the_same_bits_for_any_number_of_rows(dtype: torch.dtype) -> None:
    x, bias = torch.randn(256, 8192).to("cuda", dtype), torch.randn(8192).to("cuda", dtype)
    whole = geglu(x, bias)
    for B in (1, 2, 8, 16, 17, 64, 128):
        assert torch.equal(geglu(x[256 - B :], bias), whole[256 - B :]), B
