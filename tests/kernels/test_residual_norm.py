"""The residual + LayerNorm kernel against its definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels import residual_norm as module
from kernels.residual_norm import residual_norm

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5

Case = dict[str, Tensor | None]


def _case(device: str, dtype: torch.dtype, *shape: int, parts: str = "branch and bias") -> Case:
    torch.manual_seed(shape[-1])
    case: Case = {"x": torch.randn(*shape) * 3 + 1, "branch": torch.randn(*shape)}
    for name in ("scale", "weight", "bias", "branch_bias"):
        case[name] = torch.randn(shape[-1])
    if "bias" not in parts:
        case["branch_bias"] = None
    if "branch" not in parts:
        case["branch"] = case["scale"] = None
    return {name: None if tensor is None else tensor.to(device, dtype) for name, tensor in case.items()}


def _check_error(ours: Tensor, exact: Tensor, theirs: Tensor, device: str) -> None:
    allowed = 2 * (theirs - exact).abs().max() + 1e-7
    if device == "cpu" and ours.dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["none", "branch", "branch and bias"])
@pytest.mark.parametrize("shape", [(2, 64), (3, 33), (2, 1, 1000), (1, 1), (2, 2, 5), (7,)])
def test_error_is_at_most_twice_that_of_pytorch(
    device: str, dtype: torch.dtype, parts: str, shape: tuple[int, ...]
) -> None:
    case = _case(device, dtype, *shape, parts=parts)
    y, normed = residual_norm(**case, eps=EPS)
    assert y.dtype == normed.dtype == dtype
    assert y.shape == normed.shape == shape
    exact = {name: None if tensor is None else tensor.double() for name, tensor in case.items()}
    exact_y, _ = reference.residual_norm(**exact, eps=EPS)
    plain_y, _ = reference.residual_norm(**case, eps=EPS)
    _check_error(y, exact_y, plain_y, device)
    # normed is the norm of y as it was returned
    _, plain = reference.residual_norm(y, None, None, case["weight"], case["bias"], eps=EPS)
    _, exact_normed = reference.residual_norm(y.double(), None, None, exact["weight"], exact["bias"], eps=EPS)
    _check_error(normed, exact_normed, plain, device)


def test_without_a_branch_the_stream_passes_through(device: str) -> None:
    case = _case(device, torch.float32, 3, 20, parts="none")
    assert residual_norm(**case, eps=EPS)[0] is case["x"]


def test_variance_survives_a_large_mean(device: str) -> None:
    case = _case(device, torch.float32, 2, 300, parts="none")
    case["x"] = case["x"] + 1e4
    _, exact = reference.residual_norm(
        *(None if tensor is None else tensor.double() for tensor in list(case.values())[:5]), eps=EPS
    )
    torch.testing.assert_close(residual_norm(**case, eps=EPS)[1].double(), exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("C", [64, 33])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(device: str, C: int) -> None:
    case = _case(device, torch.float32, 6, C)
    whole = residual_norm(**case, eps=EPS)
    for rows in (slice(0, 1), slice(5, 6), slice(1, 4)):
        part = case | {"x": case["x"][rows], "branch": case["branch"][rows]}
        for ours, theirs in zip(residual_norm(**part, eps=EPS), whole, strict=True):
            assert torch.equal(ours, theirs[rows])


def test_strided_rows_and_nothing_overwritten(device: str) -> None:
    case = _case(device, torch.float32, 2, 4, 24)
    expected = residual_norm(**case, eps=EPS)
    for wide in (torch.zeros(2, 4, 50, device=device), torch.zeros(2, 8, 24, device=device)):
        view = wide[:, ::2] if wide.shape[1] == 8 else wide[..., 13:37]
        view.copy_(case["x"])
        before = wide.clone()
        for ours, theirs in zip(residual_norm(**(case | {"x": view}), eps=EPS), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
            assert ours.is_contiguous()
        assert torch.equal(wide, before)
    empty = case | {"x": case["x"][:0], "branch": case["branch"][:0]}
    assert residual_norm(**empty, eps=EPS)[1].shape == (0, 4, 24)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"x": torch.zeros(2, 9, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(2, 16385)}, "x"),
        ({"x": torch.zeros(9, 2).t(), "branch": torch.zeros(2, 9)}, "x"),
        ({"branch": torch.zeros(3, 9)}, "branch"),
        ({"branch": torch.zeros(2, 9, dtype=torch.float16)}, "branch"),
        ({"branch": torch.zeros(9, 2).t()}, "branch"),
        ({"branch": None}, "branch and scale"),
        ({"branch": None, "scale": None}, "branch_bias"),
        ({"scale": torch.zeros(8)}, "scale"),
        ({"weight": torch.zeros(18)[::2]}, "weight"),
        ({"bias": torch.zeros(9, dtype=torch.bfloat16)}, "bias"),
        ({"branch_bias": torch.zeros(9, device="meta")}, "branch_bias"),
        ({"weight": torch.zeros(9, requires_grad=True)}, "weight"),
    ],
)
def test_contract_errors_name_the_tensor(changes: Case, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        residual_norm(**(_case("cpu", torch.float32, 2, 9) | changes), eps=EPS)


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.residual_norm(**_case("cpu", torch.float32, 2, 9), eps=EPS)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1024, 1023])
def test_on_a_gpu_the_published_size_has_the_same_bits_for_any_number_of_rows(dtype: torch.dtype, C: int) -> None:
    case = _case("cuda", dtype, 256, C)
    whole = residual_norm(**case, eps=EPS)
    for B in (1, 2, 8, 16, 17, 64, 128):
        part = case | {"x": case["x"][256 - B :], "branch": case["branch"][256 - B :]}
        for ours, theirs in zip(residual_norm(**part, eps=EPS), whole, strict=True):
            assert torch.equal(ours, theirs[256 - B :]), B
