"""The linear kernel against its definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton. The interpreter works a tile of K in
Python (some 1 ms), so cases are few and small.
"""

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear as module
from kernels import reference
from kernels.linear import linear, num_counters
from kernels.reference import Norm, Residual

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = (False, False, False, False)
ALL = list(itertools.product([False, True], repeat=4))  # bias, norm, gated, residual

Case = dict[str, Any]  # the arguments of `linear` by name


def _case(
    device: str, dtype: torch.dtype, R: int, K: int, N: int, parts: tuple[bool, bool, bool, bool] = PLAIN
) -> Case:
    """As in a trained layer: weights of 1 / sqrt(K), a stream with a mean, a norm that is not the identity."""
    generator = torch.Generator().manual_seed(K + N)
    bias, norm, gated, residual = parts

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    width = N // 2 if gated else N
    case: Case = {"weight": random(N, K, scale=K**-0.5), "bias": random(N) if bias else None, "gated": gated}
    case["norm"] = Norm(1 + random(K, scale=0.3), random(K, scale=0.3), 1e-5) if norm else None
    case["x"] = random(R, K, scale=2.0) + 0.5
    case["residual"] = Residual(random(R, width), random(width)) if residual else None
    return case


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        return type(value)(*(_double(part) for part in value))  # Norm, Residual
    return value


def _rows(case: Case, rows: slice | Tensor) -> Case:
    part = case | {"x": case["x"][rows]}
    if case["residual"] is not None:
        part["residual"] = case["residual"]._replace(x=case["residual"].x[rows])
    return part


def _check_error(ours: Tensor, case: Case, device: str) -> None:
    exact = reference.linear(**{name: _double(value) for name, value in case.items()})
    theirs = reference.linear(**case)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.is_contiguous()
    allowed = 2 * (theirs - exact).abs().max() + 1e-6
    if device == "cpu" and ours.dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    if device == "cuda" and ours.dtype == torch.float32:
        # One chain of additions over all inputs; a library may sum in parallel, which errs less.
        allowed = allowed + 2**-23 * case["weight"].shape[1] ** 0.5 * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ALL)
def test_error_is_at_most_twice_that_of_pytorch(
    device: str, dtype: torch.dtype, parts: tuple[bool, bool, bool, bool]
) -> None:
    case = _case(device, dtype, 3, 80, 70, parts)
    _check_error(linear(**case), case, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "K", "N"), [(1, 1, 2), (2, 33, 2), (17, 64, 32), (33, 130, 34), (70, 96, 6), (130, 40, 10), (1, 1100, 6)]
)
def test_odd_sizes(device: str, dtype: torch.dtype, R: int, K: int, N: int) -> None:
    for parts in (PLAIN, (True, True, True, True)):
        case = _case(device, dtype, R, K, N, parts)
        _check_error(linear(**case), case, device)


@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        (torch.float32, PLAIN),
        (torch.float16, (True, False, False, True)),
        (torch.bfloat16, (True, True, True, False)),
    ],
)
def test_split_inputs(device: str, dtype: torch.dtype, parts: tuple[bool, bool, bool, bool]) -> None:
    case = _case(device, dtype, 2, 2500, 74, parts)
    assert num_counters(2, 74, 2500) > 0
    _check_error(linear(**case), case, device)


def test_variance_survives_a_large_mean(device: str) -> None:
    case = _case(device, torch.float32, 2, 300, 8, (False, True, False, False))
    case["x"] = case["x"] + 1e4
    exact = reference.linear(**{name: _double(value) for name, value in case.items()})
    torch.testing.assert_close(linear(**case).double(), exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "K", "parts"),
    [
        (torch.bfloat16, 80, (True, True, True, False)),
        (torch.float32, 77, (True, True, False, True)),
        (torch.float32, 2100, (True, False, False, True)),
    ],
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    device: str, dtype: torch.dtype, K: int, parts: tuple[bool, bool, bool, bool]
) -> None:
    case = _case(device, dtype, 70, K, 34, parts)
    whole = linear(**case)
    for R in (1, 2, 16, 17, 64):
        assert torch.equal(linear(**_rows(case, slice(70 - R, 70))), whole[70 - R :]), R
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(linear(**_rows(case, order)), whole[order])


def test_counters_are_left_as_they_were_found_and_change_nothing(device: str) -> None:
    case = _case(device, torch.float32, 20, 2100, 70, (True, False, False, True))
    wanted = num_counters(20, 70, 2100)
    counters = torch.zeros(wanted + 3, dtype=torch.int32, device=device)
    expected = linear(**case)
    for _ in range(2):
        assert torch.equal(linear(**case, counters=counters), expected)
        assert not counters.any()
    assert num_counters(20, 70, 512) == 0


def test_strided_rows_and_nothing_overwritten(device: str) -> None:
    case = _case(device, torch.float32, 4, 40, 24, (True, True, False, True))
    expected = linear(**case)
    for step, first in ((1, 0), (2, 3)):
        wide = {name: torch.full((60, 50), torch.nan, device=device) for name in ("x", "weight", "stream")}
        x, weight = (
            wide["x"][: 4 * step : step, first : first + 40],
            wide["weight"][: 24 * step : step, first : first + 40],
        )
        stream = wide["stream"][: 4 * step : step, first : first + 24]
        x.copy_(case["x"])
        weight.copy_(case["weight"])
        stream.copy_(case["residual"].x)
        before = {name: tensor.clone() for name, tensor in wide.items()}
        strided = case | {"x": x, "weight": weight, "residual": case["residual"]._replace(x=stream)}
        torch.testing.assert_close(linear(**strided), expected, atol=1e-6, rtol=1e-6)
        for name, tensor in wide.items():
            assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert linear(**_rows(case, slice(0, 0))).shape == (0, 24)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"x": torch.zeros(2, 9, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(2, 1, 9)}, "x"),
        ({"x": torch.zeros(9, 2).t()}, "x"),
        ({"weight": torch.zeros(6, 8)}, "weight"),
        ({"weight": torch.zeros(6, 9, dtype=torch.float16)}, "weight"),
        ({"weight": torch.zeros(9, 6).t()}, "weight"),
        ({"weight": torch.zeros(6, 9, requires_grad=True)}, "weight"),
        ({"weight": torch.zeros(7, 9), "bias": None, "gated": True}, "weight"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"bias": torch.zeros(6, device="meta")}, "bias"),
        ({"norm": Norm(torch.zeros(8), torch.zeros(9), 1e-5)}, "norm.weight"),
        ({"norm": Norm(torch.zeros(9), torch.zeros(18)[::2], 1e-5)}, "norm.bias"),
        ({"residual": Residual(torch.zeros(2, 5), torch.zeros(6))}, "residual.x"),
        ({"residual": Residual(torch.zeros(6, 2).t(), torch.zeros(6))}, "residual.x"),
        ({"residual": Residual(torch.zeros(2, 6), torch.zeros(5))}, "residual.scale"),
        ({"gated": True}, "residual.x"),
        ({"counters": torch.zeros(4)}, "counters"),
    ],
)
def test_contract_errors_name_the_tensor(changes: Case, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        linear(**(_case("cpu", torch.float32, 2, 9, 6, (True, True, False, True)) | changes))


def test_too_few_counters_are_refused() -> None:
    case = _case("cpu", torch.float32, 2, 2048, 6)
    with pytest.raises(ValueError, match=r"^counters: has 0; must have 1 "):
        linear(**case, counters=torch.zeros(0, dtype=torch.int32))


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.linear(**_case("cpu", torch.float32, 2, 9, 6))


# ---------------------------------------------------------------------------------------------------------- on a GPU

PUBLISHED = [  # K, N, (bias, norm, gated, residual)
    pytest.param(1024, 1536, (False, True, False, False), id="qkv"),
    pytest.param(512, 1024, (True, False, False, True), id="out"),
    pytest.param(1024, 8192, (True, True, True, False), id="grow"),
    pytest.param(4096, 1024, (True, False, False, True), id="shrink"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N", "parts"), PUBLISHED)
def test_on_a_gpu_the_published_sizes_have_the_same_bits_for_any_number_of_rows(
    dtype: torch.dtype, K: int, N: int, parts: tuple[bool, bool, bool, bool]
) -> None:
    case = _case("cuda", dtype, 256, K, N, parts)
    whole = linear(**case)
    _check_error(whole, case, "cuda")
    for R in (1, 2, 16, 17, 32, 64, 65, 128):
        assert torch.equal(linear(**_rows(case, slice(256 - R, 256))), whole[256 - R :]), R
    order = torch.randperm(256, device="cuda")
    assert torch.equal(linear(**_rows(case, order)), whole[order])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_last_of_the_splits_sees_all_others_every_time(dtype: torch.dtype) -> None:
    case = _case("cuda", dtype, 64, 4096, 1024, (True, False, False, True))
    counters = torch.zeros(num_counters(64, 1024, 4096), dtype=torch.int32, device="cuda")
    first = linear(**case, counters=counters)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        different += (linear(**case, counters=counters) != first).any()
    assert different.item() == 0
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_nothing_waits_for_the_device_and_a_graph_replays() -> None:
    case = _case("cuda", torch.bfloat16, 16, 4096, 1024, (True, True, False, True))
    counters = torch.zeros(num_counters(16, 1024, 4096), dtype=torch.int32, device="cuda")
    linear(**case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear(**case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, with_own = linear(**case, counters=counters), linear(**case)
    for seed in range(3):
        case["x"].copy_(torch.randn(16, 4096, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(captured, linear(**case))
        assert torch.equal(with_own, captured)
        assert not counters.any()
