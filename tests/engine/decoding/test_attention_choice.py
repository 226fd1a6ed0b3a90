"""The attention backends of a decode step: one function, chosen by measurement."""

import pytest
import torch
from torch import Tensor

from engine.decoding.cuda import attention_choice
from engine.decoding.cuda.attention_choice import LayerCache, decode_attention_by, fastest_attention, runnable
from engine.errors import InputError
from kernels import reference

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
M, P, N, R, H, D = 3, 5, 7, 4, 2, 8


def _case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, LayerCache, Tensor, Tensor, Tensor, Tensor]:
    """(q, cache, prefixes, num_read, new_keys, new_values), heads before positions in memory as the decoder has it."""
    torch.manual_seed(0)
    q, new_keys, new_values = torch.randn(3, R, H, D).to(DEVICE, dtype)
    prefix_keys, prefix_values = torch.randn(2, M, H, P, D).to(DEVICE, dtype).transpose(2, 3)
    keys, values = torch.randn(2, R, H, N, D).to(DEVICE, dtype).transpose(2, 3)
    prefixes, num_read = torch.tensor([2, 0, 0, 1], device=DEVICE), torch.tensor([0, 3, N - 1, 5], device=DEVICE)
    return q, LayerCache(prefix_keys, prefix_values, keys, values), prefixes, num_read, new_keys, new_values


def _one_sequence(dtype: torch.dtype) -> LayerCache:
    cache = _case(dtype)[1]
    return LayerCache(cache.prefix_keys, cache.prefix_values, cache.keys[:1], cache.values[:1])


def _check(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q, cache, prefixes, num_read, new_keys, new_values = _case(dtype)
    # float32 or better, on the same numbers
    prefix_parts = (cache.prefix_keys.float(), cache.prefix_values.float())
    keys, values = cache.keys.float(), cache.values.float()
    expected = reference.decode_attention(
        q.float(),
        *prefix_parts,
        prefixes,
        keys,
        values,
        num_read,
        new_keys=new_keys.float(),
        new_values=new_values.float(),
    )
    attended = decode_attention_by(name, DEVICE)(q, cache, prefixes, num_read, new_keys, new_values)
    assert attended.shape == (R, H, D)
    torch.testing.assert_close(attended.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache.keys.float(), keys)  # the new ones were written, and nothing else
    assert torch.equal(cache.values.float(), values)


@pytest.mark.parametrize("name", [name for name in runnable(DEVICE) if name != "xformers"])
def test_backends_compute_the_same_function(name: str) -> None:
    _check(name, torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif("xformers" not in runnable(DEVICE), reason="xformers needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xformers_computes_the_same_function_and_follows_lengths_in_a_graph(dtype: torch.dtype) -> None:
    _check("xformers", dtype, 2e-2)
    q, cache, prefixes, num_read, new_keys, new_values = _case(dtype)
    attend = decode_attention_by("xformers", DEVICE)
    attend(q, cache, prefixes, num_read, new_keys, new_values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, cache, prefixes, num_read, new_keys, new_values)
    num_read.copy_(torch.tensor([6, 1, 0, 2], device=DEVICE))
    graph.replay()
    assert torch.equal(captured, attend(q, cache, prefixes, num_read, new_keys, new_values))


def test_all_that_can_run_are_measured_and_the_fastest_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Interpreted, our kernel takes thousands of times as long as PyTorch; on a GPU any may win."""
    dtype = torch.float16 if HAS_CUDA else torch.float32
    fastest = fastest_attention([_one_sequence(dtype)] * 2, dtype, DEVICE)
    *others, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"sequences 1: {fastest} is used")
    for name in runnable(DEVICE):
        assert f"{name} " in line or any(f"{name} has no operator" in other for other in others)
    if not HAS_CUDA:
        assert fastest == "sdpa"


def test_the_shorter_time_wins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The opposite of what an interpreter measures: a slow PyTorch."""
    measure = attention_choice._measure

    def slow(attend: attention_choice.DecodeAttention, *rest: object) -> float:
        return measure(attend, *rest) + 1e6 * (attend is attention_choice._sdpa_attention)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_choice, "_measure", slow)
    assert fastest_attention([_one_sequence(torch.float32)], torch.float32, DEVICE) != "sdpa"
    assert "sdpa 1000000" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="attention: flash"):
        decode_attention_by("flash", cpu)
    with pytest.raises(InputError, match="xformers: cannot run on cpu"):
        decode_attention_by("xformers", cpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert runnable(cpu) == ["sdpa"]
    with pytest.raises(InputError, match="choose one of sdpa"):
        decode_attention_by("triton", cpu)
