"""Attention backends of a decode step: our kernel, PyTorch or xformers, and the choice of the fastest here.

R sequences, H heads, D head dim, P prefix positions, N own positions, M entries of the prefix pool, L layers.

    triton     kernels/decode_attention.py: reads prefix and own part where they lie, appends by itself, one launch
    sdpa       PyTorch: copies both parts of every sequence side by side first, (R, P + N, H, D), read or not
    xformers   memory_efficient_attention over the same layout, with lengths that it reads from the device

All three are one fixed program whatever the lengths are, fit for a CUDA graph. Only `triton` is batch-invariant, which
makes it the default. `auto` measures those that can run on this device, over the decoder's own cache, and takes the
fastest.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import InputError
from kernels.decode_attention import decode_attention

AttentionName = Literal["triton", "sdpa", "xformers"]
NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

# (q (R, H, D), LayerCache, prefixes (R,), num_read (R,), new_keys (R, H, D), new_values (R, H, D)) -> (R, H, D)
DecodeAttention = Callable[[Tensor, "LayerCache", Tensor, Tensor, Tensor, Tensor], Tensor]

_REPEATS = 5


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that one layer's attention reads.

    prefix_keys, prefix_values: (M, P, H, D). keys, values: (R, N, H, D), the sequences' own, written at `num_read`.
    """

    prefix_keys: Tensor
    prefix_values: Tensor
    keys: Tensor
    values: Tensor


def runnable(device: torch.device) -> list[AttentionName]:
    """The backends that can run on `device`, our own first."""
    is_cuda = device.type == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    has_xformers = importlib.util.find_spec("xformers") is not None
    can_run: dict[AttentionName, bool] = {
        "triton": has_triton and (is_cuda or os.environ.get("TRITON_INTERPRET") == "1"),
        "sdpa": True,
        "xformers": has_xformers and is_cuda,
    }
    return [name for name in NAMES if can_run[name]]


def decode_attention_by(name: str, device: torch.device) -> DecodeAttention:
    """The backend of that name.

    Raises:
        InputError: no such name, or it cannot run on `device`.
    """
    if name not in NAMES:
        raise InputError("attention", name, f"choose one of {', '.join(NAMES)}, or auto")
    if name not in runnable(device):
        raise InputError("attention", name, f"cannot run on {device}; choose one of {', '.join(runnable(device))}")
    if name == "xformers":
        return _xformers_attention(device)
    return _triton_attention if name == "triton" else _sdpa_attention


def fastest_attention(caches: list[LayerCache], dtype: torch.dtype, device: torch.device) -> AttentionName:
    """Measures a step's attention over some layers, at half the own positions, and reports the fastest on stderr.

    Args:
        caches: of every layer, at the number of sequences to measure; their contents are overwritten.
    """
    times_s: dict[AttentionName, float] = {}
    for name in runnable(device):
        try:
            times_s[name] = _measure(decode_attention_by(name, device), caches, dtype, device)
        except NotImplementedError:  # raised by xformers where it has nothing for this dtype or shape
            print(f"decode attention: {name} has no operator for {dtype}", file=sys.stderr)
        except ImportError as error:  # built for another torch
            print(f"decode attention: {name} cannot be imported ({error})", file=sys.stderr)
    fastest = min(times_s, key=lambda name: times_s[name])
    measured = ", ".join(f"{name} {1e6 * seconds / len(caches):.1f} us" for name, seconds in times_s.items())
    num_sequences = caches[0].keys.shape[0]
    print(f"decode attention: {measured} a layer, sequences {num_sequences}: {fastest} is used", file=sys.stderr)
    return fastest


def _measure(attend: DecodeAttention, caches: list[LayerCache], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of all layers, the best of several."""
    R, N, H, D = caches[0].keys.shape
    q, new_keys, new_values = torch.zeros(3, R, H, D, dtype=dtype, device=device)
    prefixes = torch.zeros(R, dtype=torch.int64, device=device)
    num_read = torch.full_like(prefixes, N // 2)

    def step() -> None:
        for cache in caches:
            attend(q, cache, prefixes, num_read, new_keys, new_values)

    step()  # compiles
    if device.type == "cpu":
        return min(_seconds(step) for _ in range(_REPEATS))
    # As a graph, as it will run: launched one by one, the host's time would be measured instead.
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    replay()
    return min(_seconds(replay) for _ in range(_REPEATS))


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _triton_attention(
    q: Tensor, cache: LayerCache, prefixes: Tensor, num_read: Tensor, new_keys: Tensor, new_values: Tensor
) -> Tensor:
    return decode_attention(
        q, cache.prefix_keys, cache.prefix_values, prefixes, cache.keys, cache.values, num_read,
        new_keys=new_keys, new_values=new_values,
    )  # fmt: skip


def _sdpa_attention(
    q: Tensor, cache: LayerCache, prefixes: Tensor, num_read: Tensor, new_keys: Tensor, new_values: Tensor
) -> Tensor:
    keys, values = _side_by_side(cache, prefixes, num_read, new_keys, new_values)  # (R, P + N, H, D)
    P = cache.prefix_keys.shape[1]
    is_read = torch.arange(keys.shape[1], dtype=torch.int64, device=q.device) <= P + num_read[:, None]  # (R, P + N)
    attended = F.scaled_dot_product_attention(
        q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), attn_mask=is_read[:, None, None]
    )  # (R, H, 1, D)
    return attended[:, :, 0]


def _xformers_attention(device: torch.device) -> DecodeAttention:
    """A bias is made once for each number of sequences, outside any capture; a step changes its lengths."""
    ops = importlib.import_module("xformers.ops")  # on first use: it costs seconds and probes the GPU
    biases: dict[tuple[int, int], Any] = {}

    def attend(
        q: Tensor, cache: LayerCache, prefixes: Tensor, num_read: Tensor, new_keys: Tensor, new_values: Tensor
    ) -> Tensor:
        keys, values = _side_by_side(cache, prefixes, num_read, new_keys, new_values)  # (R, P + N, H, D)
        R, padding = keys.shape[:2]
        if (R, padding) not in biases:
            biases[R, padding] = ops.fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                [1] * R, padding, [padding] * R, device=device
            )
        bias = biases[R, padding]
        bias.k_seqinfo.seqlen.copy_(num_read + (1 + cache.prefix_keys.shape[1]))
        attended: Tensor = ops.memory_efficient_attention_forward(
            q[None], keys.flatten(0, 1)[None], values.flatten(0, 1)[None], attn_bias=bias
        )  # (1, R, H, D)
        return attended[0]

    return attend


def _side_by_side(
    cache: LayerCache, prefixes: Tensor, num_read: Tensor, new_keys: Tensor, new_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Appends, and copies each sequence's prefix and own positions into one: (R, P + N, H, D) twice."""
    sequences = torch.arange(num_read.shape[0], dtype=torch.int64, device=num_read.device)
    cache.keys[sequences, num_read] = new_keys
    cache.values[sequences, num_read] = new_values
    keys = torch.cat([cache.prefix_keys[prefixes], cache.keys], dim=1)
    return keys, torch.cat([cache.prefix_values[prefixes], cache.values], dim=1)
