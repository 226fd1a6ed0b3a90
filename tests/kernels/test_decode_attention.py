"""The decode attention kernel against its definition: interpreted on the CPU, compiled on a GPU.

Without a GPU, TRITON_INTERPRET=1 must be set before anything imports triton. The interpreter computes a (sequence, head) in
Python (some 10 ms), so cases are few and small.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import decode_attention as module
from kernels import reference
from kernels.decode_attention import decode_attention

HAS_CUDA = torch.cuda.is_available()
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _case(
    device: str, dtype: torch.dtype, *, B: int, G: int, H: int, D: int, P: int, N: int, seed: int = 0
) -> dict[str, Tensor]:
    """As the sampler holds it: heads before positions in memory, slots beyond num_filled unwritten (NaN)."""
    torch.manual_seed(seed)
    q = torch.randn(B, 3, H, D).unbind(1)[0]
    prefix_keys, prefix_values = torch.randn(2, G, H, P, D).transpose(2, 3).unbind(0)
    keys, values = torch.randn(2, B, H, N, D).transpose(2, 3).unbind(0)
    num_filled = torch.randint(0, N + 1, (B,))
    num_filled[-1] = N
    for row in range(B):
        keys[row, num_filled[row] :] = torch.nan
        values[row, num_filled[row] :] = torch.nan
    floats = {
        "q": 2 * q, "prefix_keys": prefix_keys, "prefix_values": prefix_values, "keys": keys, "values": values
    }  # fmt: skip
    integers = {"prefix_of_sequence": torch.arange(B).flip(0) % G, "num_filled": num_filled}
    case = {name: tensor.to(device, dtype) for name, tensor in floats.items()}
    return case | {name: tensor.to(device) for name, tensor in integers.items()}


def _exact(case: dict[str, Tensor]) -> Tensor:
    return reference.decode_attention(**{name: t.double() if t.is_floating_point() else t for name, t in case.items()})


def _plain(case: dict[str, Tensor]) -> Tensor:
    """The same in PyTorch, every product in the inputs' dtype."""
    q, caption, P = case["q"], case["prefix_of_sequence"].long(), case["prefix_keys"].shape[1]
    keys = torch.cat([case["prefix_keys"][caption], case["keys"].nan_to_num()], dim=1)
    values = torch.cat([case["prefix_values"][caption], case["values"].nan_to_num()], dim=1)
    unread = torch.arange(keys.shape[1], device=q.device) >= P + case["num_filled"][:, None]
    scores = torch.einsum("bhd,bthd->bht", q * q.shape[2] ** -0.5, keys).masked_fill(unread[:, None], -torch.inf)
    return torch.einsum("bht,bthd->bhd", scores.softmax(-1), values)


def _check_error(ours: Tensor, exact: Tensor, theirs: Tensor, device: str) -> None:
    allowed = 2 * (theirs - exact).abs().max() + 1e-7
    if device == "cpu" and ours.dtype == torch.bfloat16:
        allowed = allowed + 2**-7 * exact.abs().max()  # the interpreter cuts float32 to bfloat16, hardware rounds
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 4, "G": 2, "H": 2, "D": 16, "P": 70, "N": 130},
        {"B": 2, "G": 2, "H": 1, "D": 64, "P": 129, "N": 5},
        {"B": 3, "G": 1, "H": 2, "D": 13, "P": 1, "N": 65},
        {"B": 1, "G": 1, "H": 1, "D": 1, "P": 64, "N": 64},
        {"B": 2, "G": 3, "H": 1, "D": 40, "P": 3, "N": 0},
    ],
)
def test_error_is_at_most_twice_that_of_pytorch(device: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    case = _case(device, dtype, **sizes)
    ours = decode_attention(**case)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    _check_error(ours, _exact(case), _plain(case), device)


def test_reference_is_attention_over_the_whole_sequence(device: str) -> None:
    case = _case(device, torch.float32, B=4, G=2, H=2, D=16, P=9, N=7)
    ours = reference.decode_attention(**case)
    for row in range(4):
        caption, filled = case["prefix_of_sequence"][row], case["num_filled"][row]
        keys, values = (
            torch.cat([case[f"prefix_{part}"][caption], case[part][row, :filled]])[None] for part in ("keys", "values")
        )
        expected = reference.attention(case["q"][row][None, None], keys, values, causal=False)[0, 0]
        torch.testing.assert_close(ours[row], expected)


@pytest.mark.parametrize("D", [16, 13])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(device: str, D: int) -> None:
    case = _case(device, torch.float32, B=4, G=2, H=2, D=D, P=67, N=70)
    whole = decode_attention(**case)
    per_sequence = ("q", "prefix_of_sequence", "keys", "values", "num_filled")
    for row in range(4):
        alone = case | {name: case[name][row : row + 1] for name in per_sequence}
        assert torch.equal(decode_attention(**alone)[0], whole[row])
    order = torch.tensor([2, 2, 0], device=device)
    mixed = case | {name: case[name][order] for name in per_sequence}
    assert torch.equal(decode_attention(**mixed), whole[order])


def test_the_number_of_positions_changes_no_bits(device: str) -> None:
    case = _case(device, torch.float32, B=2, G=1, H=1, D=16, P=10, N=80)
    case["num_filled"] = torch.tensor([70, 3], device=device)
    case["keys"], case["values"] = case["keys"].nan_to_num(), case["values"].nan_to_num()
    shorter = case | {"keys": case["keys"][:, :70], "values": case["values"][:, :70]}
    assert torch.equal(decode_attention(**case), decode_attention(**shorter))
    assert torch.equal(
        decode_attention(**case | {"num_filled": torch.tensor([99, 3], device=device)})[0],  # taken as all 80
        decode_attention(**case | {"num_filled": torch.tensor([80, 3], device=device)})[0],
    )


def test_any_strides_give_the_same_bits(device: str) -> None:
    case = _case(device, torch.float32, B=2, G=2, H=2, D=16, P=20, N=30)
    expected = decode_attention(**case)
    positions_first = {name: tensor.contiguous() for name, tensor in case.items()}
    assert torch.equal(decode_attention(**positions_first), expected)
    wide = torch.zeros(2, 30, 2, 48, device=device)
    wide[..., 16:32] = case["keys"]
    assert torch.equal(decode_attention(**case | {"keys": wide[..., 16:32]}), expected)
    narrow = {"num_filled": case["num_filled"].int(), "prefix_of_sequence": case["prefix_of_sequence"].int()}
    assert torch.equal(decode_attention(**case | narrow), expected)


def _with_new(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The case and a new key and value a sequence, views of one projection as the model makes them; own cache."""
    B, H, D = case["q"].shape
    projected = torch.randn(B, 3, H, D, generator=torch.Generator().manual_seed(B)).to(case["q"])
    copies = {name: case[name].clone(memory_format=torch.preserve_format) for name in ("keys", "values")}
    return case | copies | {"new_keys": projected[:, 1], "new_values": projected[:, 2]}


def _write(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new keys and values written first, as a step in two launches does it."""
    case = dict(case)
    for name in ("keys", "values"):
        new, cache = case.pop(f"new_{name}"), case[name].clone(memory_format=torch.preserve_format)
        for row, slot in enumerate(case["num_filled"].tolist()):
            if slot < cache.shape[1]:
                cache[row, slot] = new[row]
        case[name] = cache
    case["num_filled"] = (case["num_filled"] + 1).clamp(max=case["keys"].shape[1])
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("D", "N", "filled"), [(16, 130, [0, 63, 64, 130]), (13, 65, [1, 64, 65, 12]), (40, 1, [0, 1, 0, 1])]
)
def test_appending_is_writing_and_then_attending(
    device: str, dtype: torch.dtype, D: int, N: int, filled: list[int]
) -> None:
    case = _case(device, dtype, B=4, G=2, H=2, D=D, P=3, N=N)
    slots = torch.arange(N, device=device)[:, None, None]
    for name in ("keys", "values"):
        rows = [
            torch.where(slots < count, case[name][row].nan_to_num(0.5), torch.nan) for row, count in enumerate(filled)
        ]
        case[name] = torch.stack(rows)
    case["num_filled"] = torch.tensor(filled, device=device)
    case = _with_new(case)
    written = _write(case)
    by_reference = _with_new(case)
    ours, expected = decode_attention(**case), decode_attention(**written)
    if device == "cpu":
        assert torch.equal(ours, expected)
    else:  # two compiled kernels, each with its own fused multiply-adds
        _check_error(ours, _exact(written), _plain(written), device)
    assert torch.equal(reference.decode_attention(**by_reference), reference.decode_attention(**written))
    for name in ("keys", "values"):
        for cache in (case[name], by_reference[name]):
            assert torch.equal(cache.nan_to_num(9e4), written[name].nan_to_num(9e4)), name


def test_a_full_sequence_writes_nothing(device: str) -> None:
    """Memory after the last position belongs to the next sequence and must stay as it is."""
    case = _with_new(_case(device, torch.float32, B=2, G=1, H=2, D=16, P=3, N=5))
    case["num_filled"] = torch.tensor([5, 7], device=device)
    case["keys"], case["values"] = torch.randn(2, 2, 8, 2, 16, device=device).unbind(0)
    before = {name: case[name].clone() for name in ("keys", "values")}
    short = case | {name: case[name][:, :5] for name in ("keys", "values")}
    without = {name: tensor for name, tensor in short.items() if not name.startswith("new")}
    torch.testing.assert_close(decode_attention(**short), decode_attention(**without), atol=1e-6, rtol=1e-6)
    for name, tensor in before.items():
        assert torch.equal(case[name], tensor)


def test_an_appended_sequence_has_the_same_bits_alone_and_in_any_batch(device: str) -> None:
    case = _with_new(_case(device, torch.float32, B=4, G=2, H=2, D=16, P=67, N=70))
    whole = decode_attention(**case)
    per_sequence = ("q", "prefix_of_sequence", "keys", "values", "num_filled", "new_keys", "new_values")
    for row in range(4):
        alone = case | {name: case[name][row : row + 1] for name in per_sequence}
        assert torch.equal(decode_attention(**alone)[0], whole[row])


def test_large_scores_do_not_overflow(device: str) -> None:
    case = _case(device, torch.float32, B=2, G=1, H=1, D=16, P=70, N=70)
    case["q"] = case["q"] * 1000
    torch.testing.assert_close(decode_attention(**case).double(), _exact(case), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"q": torch.zeros(2, 3, 16, dtype=torch.float64)}, "q"),
        ({"q": torch.zeros(2, 3, 257)}, "q"),
        ({"prefix_keys": torch.zeros(2, 5, 3, 8)}, "prefix_keys"),
        ({"prefix_values": torch.zeros(2, 4, 3, 16)}, "prefix_keys, prefix_values"),
        ({"prefix_keys": torch.zeros(2, 0, 3, 16), "prefix_values": torch.zeros(2, 0, 3, 16)}, "prefix_keys, prefix_"),
        ({"keys": torch.zeros(2, 6, 3, 16, dtype=torch.float16)}, "keys"),
        ({"keys": torch.zeros(3, 6, 3, 16)}, "keys, values"),
        ({"values": torch.zeros(2, 6, 3, 32)[..., ::2]}, "values"),
        ({"prefix_of_sequence": torch.zeros(2)}, "prefix_of_sequence"),
        ({"num_filled": torch.zeros(3, dtype=torch.int64)}, "num_filled"),
        ({"num_filled": torch.zeros(2, dtype=torch.int64, device="meta")}, "num_filled"),
        ({"q": torch.zeros(2, 3, 16, requires_grad=True)}, "q"),
        ({"new_keys": torch.zeros(2, 3, 16)}, "new_keys, new_values: pass both"),
        ({"new_keys": torch.zeros(2, 3, 16), "new_values": torch.zeros(2, 3, 8)}, "new_values"),
        ({"new_keys": torch.zeros(2, 3, 32)[..., ::2], "new_values": torch.zeros(2, 3, 16)}, "new_keys"),
        ({"new_keys": torch.zeros(2, 3, 16, device="meta"), "new_values": torch.zeros(2, 3, 16)}, "new_keys"),
    ],
)
def test_contract_errors_name_the_tensor(changes: dict[str, Tensor], field: str) -> None:
    case = _case("cpu", torch.float32, B=2, G=2, H=3, D=16, P=5, N=6)
    with pytest.raises(ValueError, match=f"^{field}"):
        decode_attention(**(case | changes))


def test_without_triton_the_module_imports_and_its_function_says_what_is_missing(
    without_triton: Callable[[ModuleType], Any],
) -> None:
    bare = without_triton(module)
    with pytest.raises(ImportError, match="pip install triton"):
        bare.decode_attention(**_case("cpu", torch.float32, B=1, G=1, H=1, D=8, P=2, N=2))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_the_published_sizes_have_the_same_bits_in_every_batch_size(dtype: torch.dtype) -> None:
    case = _case("cuda", dtype, B=256, G=16, H=8, D=64, P=129, N=255)
    whole = decode_attention(**case)
    _check_error(whole, _exact(case), _plain(case), "cuda")
    per_sequence = ("q", "prefix_of_sequence", "keys", "values", "num_filled")
    for B in (1, 2, 8, 16, 17, 64, 128):
        part = case | {name: case[name][256 - B :] for name in per_sequence}
        assert torch.equal(decode_attention(**part), whole[256 - B :]), B


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_appending_at_the_published_sizes_has_the_same_bits_in_every_batch_size(dtype: torch.dtype) -> None:
    case = _with_new(_case("cuda", dtype, B=256, G=16, H=8, D=64, P=129, N=255))
    written = _write(case)
    whole = decode_attention(**case)
    _check_error(whole, _exact(written), _plain(written), "cuda")
    for name in ("keys", "values"):
        assert torch.equal(case[name].nan_to_num(), written[name].nan_to_num())
    per_sequence = ("q", "prefix_of_sequence", "keys", "values", "num_filled", "new_keys", "new_values")
    for B in (1, 2, 16, 17, 64, 128):
        part = case | {name: case[name][256 - B :] for name in per_sequence}
        assert torch.equal(decode_attention(**part), whole[256 - B :]), B


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_a_captured_step_follows_num_filled() -> None:
    case = _case("cuda", torch.bfloat16, B=4, G=2, H=8, D=64, P=129, N=255)
    decode_attention(**case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(**case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(**case)
    case["num_filled"].copy_(torch.tensor([0, 1, 5, 9], device="cuda").clamp(max=case["num_filled"]))
    graph.replay()
    assert torch.equal(captured, decode_attention(**case))
