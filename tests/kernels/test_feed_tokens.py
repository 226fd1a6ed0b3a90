"""The kernel between sampling and layers against its definition: interpreted on the CPU, compiled on a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import feed_tokens as module
from kernels import reference_slots
from kernels.feed_tokens import feed_tokens

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _case(
    device: str, dtype: torch.dtype, *, S: int, R: int, N: int, V: int = 11, C: int = 13, seed: int = 0
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    init_tokens = torch.randint(0, V, (S, N))
    case = {
        "sampled": torch.randint(0, V, (R,)),
        "source": torch.randint(0, R, (R,)),
        "init_tokens": torch.where(torch.rand(S, N) < 0.5, init_tokens, -1),
        "tokens": torch.full((S, N + 1), -7),
        "positions": torch.randint(0, N + 1, (R,)),
        "embedding": torch.randn(V, C).to(dtype),
        "position_table": torch.randn(N, C).to(dtype),
    }
    case["positions"][-1] = N
    return {name: tensor.to(device) for name, tensor in case.items()}


def _both(case: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(x, num_read, tokens, positions) of the kernel and of the definition."""
    results = []
    for function in (feed_tokens, reference_slots.feed_tokens):
        copied = {name: tensor.clone() for name, tensor in case.items()}
        results.append((*function(**copied), copied["tokens"], copied["positions"]))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "R", "N"), [(9, 7, 5), (3, 3, 2), (2, 2, 1), (4, 1, 16)])
def test_kernel_does_what_the_definition_says(device: str, dtype: torch.dtype, S: int, R: int, N: int) -> None:
    for seed in range(3):
        case = _case(device, dtype, S=S, R=R, N=N, seed=seed)
        (x, *ours), (expected_x, *expected) = _both(case)
        for tensor, wanted in zip(ours, expected, strict=True):
            assert torch.equal(tensor, wanted)
        # the interpreter cuts float32 to bfloat16, hardware rounds
        is_cut = device == "cpu" and dtype == torch.bfloat16
        torch.testing.assert_close(x, expected_x, rtol=2**-7 if is_cut else 0, atol=2**-7 if is_cut else 0)


def test_definition_by_hand() -> None:
    case = _case("cpu", torch.float32, S=4, R=3, N=4, C=2)
    case["sampled"] = torch.tensor([5, 6, 7])
    case["source"] = torch.tensor([0, 1, 0])  # the third slot is fed the first one's token
    case["init_tokens"] = torch.tensor([[-1, 9, -1, -1], [-1, -1, -1, 3], [4, 4, 4, 4], [8, 8, 8, 8]])
    case["positions"] = torch.tensor([1, 2, 1])
    x, num_read = reference_slots.feed_tokens(**case)
    assert case["tokens"][:3].tolist() == [[-7, 9, -7, -7, -7], [-7, -7, 6, -7, -7], [-7, 9, -7, -7, -7]]
    assert case["positions"].tolist() == [2, 3, 2]
    assert num_read.tolist() == [1, 2, 1]
    assert torch.equal(x[2], case["embedding"][9] + case["position_table"][1])
    assert torch.equal(x[1], case["embedding"][6] + case["position_table"][2])


def test_a_finished_sequence_keeps_its_tokens(device: str) -> None:
    case = _case(device, torch.float32, S=2, R=2, N=3)
    case["positions"] = torch.tensor([2, 3], device=device)
    _, num_read = feed_tokens(**case)
    assert case["positions"].tolist() == [3, 3]
    assert num_read.tolist() == [1, 1]
    assert case["tokens"][0, 2] != -7
    assert case["tokens"][1, :3].tolist() == [-7, -7, -7]


def test_stale_indices_stay_in_bounds(device: str) -> None:
    case = _case(device, torch.float32, S=4, R=2, N=3)
    case |= {"init_tokens": torch.full_like(case["init_tokens"], -1), "positions": torch.tensor([0, 3], device=device)}
    case |= {"source": torch.tensor([0, 10**9], device=device), "sampled": torch.tensor([2**40, -5], device=device)}
    (x, num_read, tokens, positions), expected = _both(case)
    assert tokens[0, 0] == 10  # the last token there is
    assert tokens[1, 3] == 0
    for tensor, wanted in zip((x, num_read, tokens, positions), expected, strict=True):
        assert torch.equal(tensor, wanted)
    assert (tokens[2:] == -7).all()


def test_rows_may_be_strided(device: str) -> None:
    case = _case(device, torch.float32, S=5, R=4, N=6)
    expected = _both(case)[0]
    for name in ("init_tokens", "tokens", "embedding", "position_table"):
        wide = torch.zeros(case[name].shape[0], 40, dtype=case[name].dtype, device=device)
        wide[:, 3 : 3 + case[name].shape[1]] = case[name]
        case[name] = wide[:, 3 : 3 + case[name].shape[1]]
    x, num_read = feed_tokens(**case)
    for tensor, wanted in zip((x, num_read, case["tokens"], case["positions"]), expected, strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"embedding": torch.zeros(11, 13, dtype=torch.float64)}, "embedding"),
        ({"embedding": torch.zeros(11, 13, requires_grad=True)}, "embedding"),
        ({"embedding": torch.zeros(11, 26)[:, ::2]}, "embedding"),
        ({"init_tokens": torch.zeros(4, 5)}, "init_tokens"),
        ({"tokens": torch.zeros(4, 5, dtype=torch.int64)}, "tokens"),
        ({"position_table": torch.zeros(4, 13)}, "position_table"),
        ({"sampled": torch.zeros(3, dtype=torch.int32)}, "sampled"),
        ({"source": torch.zeros(2, dtype=torch.int64)}, "source"),
        ({"positions": torch.zeros(6, dtype=torch.int64)[::2]}, "positions"),
        ({name: torch.zeros(5, dtype=torch.int64) for name in ("sampled", "source", "positions")}, "sampled"),
        ({"tokens": torch.zeros(4, 6, dtype=torch.int64, device="meta")}, "tokens"),
    ],
)
def test_contract_errors_name_the_tensor(changes: dict[str, Tensor], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        feed_tokens(**_case("cpu", torch.float32, S=4, R=3, N=5) | changes)


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.feed_tokens(**_case("cpu", torch.float32, S=2, R=2, N=3))
