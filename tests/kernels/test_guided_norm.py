"""The head's input kernel against its definition: interpreted on the CPU, compiled on a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import guided_norm as module
from kernels import reference_slots
from kernels.guided_norm import guided_norm

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def _case(device: str, dtype: torch.dtype, *, S: int, R: int, C: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    guidance = torch.ones(R)
    guidance[::2] = torch.tensor([3.0, 0.5, 0.0, 7.0])[: len(guidance[::2])]
    case = {
        "x": (5 * torch.randn(S, C) + 1).to(dtype),
        "unconditional": torch.arange(R).flip(0),
        "guidance": guidance,
        "weight": (1 + torch.randn(C)).to(dtype),
        "bias": torch.randn(C).to(dtype),
    }
    return {name: tensor.to(device) for name, tensor in case.items()}


def _plain(case: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The definition at another precision throughout."""
    return reference_slots.guided_norm(
        **{name: tensor.to(dtype) if name in ("x", "weight", "bias") else tensor for name, tensor in case.items()},
        eps=EPS,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "R", "C"), [(9, 7, 64), (3, 3, 13), (4, 1, 1024), (2, 2, 1)])
def test_error_is_at_most_twice_that_of_the_definition(device: str, dtype: torch.dtype, S: int, R: int, C: int) -> None:
    case = _case(device, dtype, S=S, R=R, C=C)
    ours, exact = guided_norm(**case, eps=EPS), _plain(case, torch.float64)
    assert ours.dtype == dtype
    assert ours.shape == (R, C)
    allowed = 2 * (reference_slots.guided_norm(**case, eps=EPS) - exact).abs().max() + 1e-6 * exact.abs().max()
    if device == "cpu" and dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    assert (ours - exact).abs().max() <= allowed


def test_definition_is_a_mix_of_two_norms() -> None:
    case = _case("cpu", torch.float64, S=4, R=4, C=16)
    case["guidance"] = torch.tensor([3.0, 1.0, 1.0, 0.0])
    case["unconditional"] = torch.tensor([2, 2, 0, 1])
    normed = torch.nn.functional.layer_norm(case["x"], (16,), case["weight"], case["bias"], EPS)
    expected = torch.stack([normed[2] + 3 * (normed[0] - normed[2]), normed[1], normed[2], normed[1]])
    torch.testing.assert_close(reference_slots.guided_norm(**case, eps=EPS), expected)


def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    case = _case(device, torch.float32, S=8, R=8, C=48)
    case["guidance"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0], device=device)
    case["unconditional"] = torch.tensor([0, 0, 2, 3, 1, 5, 6, 7], device=device)
    whole = guided_norm(**case, eps=EPS)
    for R in (1, 2, 5):
        fewer = case | {name: case[name][:R] for name in ("unconditional", "guidance")}
        assert torch.equal(guided_norm(**fewer, eps=EPS), whole[:R])
    moved = {
        "x": case["x"][[3, 1, 0]],
        "unconditional": torch.tensor([0, 2, 2]),
        "guidance": torch.tensor([1.0, 2.0, 1.0]),
    }
    moved = {name: tensor.to(device) for name, tensor in moved.items()}
    assert torch.equal(guided_norm(**case | moved, eps=EPS), whole[[3, 1, 0]])


def test_rows_may_be_strided_and_a_stale_index_stays_in_bounds(device: str) -> None:
    case = _case(device, torch.float32, S=4, R=3, C=16)
    expected = guided_norm(**case, eps=EPS)
    wide = torch.randn(4, 48, device=device)
    wide[:, 16:32] = case["x"]
    assert torch.equal(guided_norm(**case | {"x": wide[:, 16:32]}, eps=EPS), expected)
    far, last = torch.tensor([10**6, 1, 2], device=device), torch.tensor([2, 1, 2], device=device)
    assert torch.equal(
        guided_norm(**case | {"unconditional": far}, eps=EPS), guided_norm(**case | {"unconditional": last}, eps=EPS)
    )
    no_rows = case | {name: case[name][:0] for name in ("unconditional", "guidance")}
    assert guided_norm(**no_rows, eps=EPS).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(4, 16)[:, ::2]}, "x"),
        ({"x": torch.zeros(4, 8, requires_grad=True)}, "x"),
        ({"unconditional": torch.zeros(3, dtype=torch.int32)}, "unconditional"),
        ({"unconditional": torch.zeros(5, dtype=torch.int64)}, "unconditional"),
        ({"guidance": torch.zeros(2)}, "guidance"),
        ({"guidance": torch.zeros(3, dtype=torch.float64)}, "guidance"),
        ({"weight": torch.zeros(9)}, "weight"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias"),
        ({"bias": torch.zeros(8, device="meta")}, "bias"),
    ],
)
def test_contract_errors_name_the_tensor(changes: dict[str, Tensor], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        guided_norm(**_case("cpu", torch.float32, S=4, R=3, C=8) | changes, eps=EPS)


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.guided_norm(**_case("cpu", torch.float32, S=2, R=2, C=8), eps=EPS)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_published_sizes_have_the_same_bits_for_any_number_of_rows(dtype: torch.dtype) -> None:
    case = _case("cuda", dtype, S=256, R=8, C=1024)
    case["unconditional"] = torch.arange(256, device="cuda") // 2
    case["guidance"] = torch.where(torch.arange(256, device="cuda") % 3 == 0, 3.0, 1.0)
    whole = guided_norm(**case, eps=EPS)
    for R in (1, 2, 8, 16, 17, 64, 128):
        fewer = case | {name: case[name][:R] for name in ("unconditional", "guidance")}
        assert torch.equal(guided_norm(**fewer, eps=EPS), whole[:R]), R
