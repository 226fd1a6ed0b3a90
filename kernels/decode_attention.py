"""Attention of one query a sequence over its caption's shared prefix and its own positions, in one kernel.

G captions, B sequences, H heads, D head dim, P prefix positions, N own positions, T positions of either part.

    keys of sequence b   [ prefix of its caption: 0 .. P-1 ][ own: 0 .. num_filled[b]-1 | never read ]
    splits               |  64  |  64  | 1 .. 64 |          |  64  |  64  | 1 .. 64 |

One program a (sequence, head) walks the splits in that order and folds each into a running (maximum, sum, weighted
values). A split is 64 positions for every shape and starts where its part starts, so a sequence's sums run in one order
whatever the rest of the batch, and it may be at any position: its length is read from the device.

A sequence's new key and value can be passed as well. The program that attends to a (sequence, head) also writes them,
and takes the new position from registers, at the place in its split where memory would have had it: the sums are those
of a separate write followed by attention, without the launch (16 a step) and without waiting for the write.

The prefix is stored once a caption and every sibling reads it. At 129 positions it is 264 KB a layer (16 bit), which
the second and later siblings find in L2. The launch is not split over positions: from 16 sequences of 8 heads on,
programs outnumber the processors of an H100, and for fewer a second launch to merge costs what the split would gain.

Scores, weights and sums are float32 whatever the inputs are, on plain multiply-adds: one query a sequence leaves 15 of
a matrix unit's 16 rows empty, and the read of the cache is the limit (1 flop a byte at 16 bit).
"""

import math

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when the kernel is called
    triton = None

_SPLIT = 64  # positions; part of the result's bits, see above
_HEAD_DIM_MAX = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode_attention(
    q: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_of_sequence: Tensor,
    keys: Tensor,
    values: Tensor,
    num_filled: Tensor,
    *,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> Tensor:
    """softmax(q [prefix_keys, keys]^T / sqrt(D)) [prefix_values, values], as `kernels.reference.decode_attention`.

    Args:
        q: (B, H, D) float32, float16 or bfloat16; D at most 256.
        prefix_keys, prefix_values: (G, P, H, D) of q's dtype, P at least 1.
        prefix_of_sequence: (B,) int32 or int64 in [0, G). Values on the device are not checked, which would wait for it.
        keys, values: (B, N, H, D) of q's dtype; positions from num_filled on may hold anything, NaN included.
        num_filled: (B,) int32 or int64 in [0, N], taken as N where it is more.
        new_keys, new_values: (B, H, D) of q's dtype, both or neither: written to position num_filled of `keys` and
            `values` (in place) and attended to as well. A sequence whose N positions are all filled drops them.

        Any strides (the cache stores H before T), but D must be contiguous.

    Returns:
        (B, H, D) in q's dtype, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that needs a gradient.
        ImportError: triton is not installed.
    """
    _check(q, prefix_keys, prefix_values, prefix_of_sequence, keys, values, num_filled, new_keys, new_values)
    B, H, D = q.shape
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    appends = new_keys is not None
    if new_keys is None or new_values is None:
        new_keys = new_values = q  # stand-ins that are never read
    floats = (q, prefix_keys, prefix_values, keys, values, new_keys, new_values)
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(B, H)](
            out, q, prefix_keys, prefix_values, prefix_of_sequence, keys, values, num_filled, new_keys, new_values,
            *(_strides(tensor) for tensor in floats),
            prefix_keys.shape[1], keys.shape[1], math.log2(math.e) / math.sqrt(D),
            H=H, D=D, SPLIT=_SPLIT, BLOCK_D=triton.next_power_of_2(D), APPEND=appends, ALIGNED=_aligned(*floats),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(
    q: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_of_sequence: Tensor,
    keys: Tensor,
    values: Tensor,
    num_filled: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
) -> None:
    if q.dim() != 3 or q.dtype not in _DTYPES or not 0 < q.shape[2] <= _HEAD_DIM_MAX:
        raise ValueError(f"q: {words(q)}; must be (B, H, D) float32, float16 or bfloat16, D at most {_HEAD_DIM_MAX}")
    B, H, D = q.shape
    parts = {"prefix_keys": prefix_keys, "prefix_values": prefix_values, "keys": keys, "values": values}
    for name, tensor in parts.items():
        if tensor.dim() != 4 or tensor.shape[2:] != (H, D) or tensor.dtype != q.dtype:
            raise ValueError(f"{name}: {words(tensor)}; must be (sequences, positions, {H}, {D}) {q.dtype}")
    if prefix_values.shape != prefix_keys.shape or 0 in prefix_keys.shape[:2]:
        shapes = f"{tuple(prefix_keys.shape)} and {tuple(prefix_values.shape)}"
        raise ValueError(f"prefix_keys, prefix_values: {shapes}; must be one shape, with a caption and a position")
    if keys.shape[0] != B or values.shape != keys.shape:
        raise ValueError(
            f"keys, values: {tuple(keys.shape)} and {tuple(values.shape)}; must be one shape of {B} sequences"
        )
    for name, tensor in {"prefix_of_sequence": prefix_of_sequence, "num_filled": num_filled}.items():
        is_integer = tensor.dtype in (torch.int32, torch.int64)
        if tensor.shape != (B,) or not is_integer or not tensor.is_contiguous():
            raise ValueError(f"{name}: {words(tensor)}; must be ({B},) int32 or int64, contiguous")
    floats = {"q": q, **parts, **_check_new(q, new_keys, new_values)}
    for name, tensor in floats.items():
        if tensor.stride(-1) != 1 and D > 1:
            raise ValueError(f"{name}: {words(tensor)}; D must be contiguous")
    check_no_gradient(floats)
    check_beside("q", q, {**floats, "prefix_of_sequence": prefix_of_sequence, "num_filled": num_filled})
    check_runs(
        "kernels.decode_attention",
        "q",
        q,
        triton and _decode_attention_kernel,
        reference="kernels.reference.decode_attention",
    )


def _check_new(q: Tensor, new_keys: Tensor | None, new_values: Tensor | None) -> dict[str, Tensor]:
    """The new keys and values by name; empty where there are none."""
    if new_keys is None and new_values is None:
        return {}
    if new_keys is None or new_values is None:
        raise ValueError("new_keys, new_values: pass both or neither")
    new = {"new_keys": new_keys, "new_values": new_values}
    for name, tensor in new.items():
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(f"{name}: {words(tensor)}; must be like q, {words(q)}")
    return new


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """All but D's; 0 for a dimension of size 1, whose stride may be anything."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )


def _aligned(*tensors: Tensor) -> bool:
    """Whether every run of D elements in these tensors starts at a multiple of 16 bytes.

    The compiler picks load width from this, and with it the order of the sums. Left to itself it looks at the first
    element only, which for an odd D is aligned in one sequence and not in the next.
    """
    return all(
        stride * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
        for stride in (tensor.shape[-1], *tensor.stride()[:-1])
    )


if triton is not None:

    @triton.jit(
        do_not_specialize_on_alignment=[
            "q", "prefix_keys", "prefix_values", "keys", "values", "new_keys", "new_values"
        ]
    )  # fmt: skip
    def _decode_attention_kernel(  # type: ignore[no-untyped-def]
        out, q, prefix_keys, prefix_values, prefix_of_sequence, keys, values, num_filled, new_keys, new_values,
        q_strides, prefix_key_strides, prefix_value_strides, key_strides, value_strides,
        new_key_strides, new_value_strides, num_prefix, num_positions, scale,
        H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
        APPEND: tl.constexpr, ALIGNED: tl.constexpr,
    ):  # fmt: skip
        """`scale` carries log2(e): the softmax is taken in base 2."""
        sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        caption = tl.load(prefix_of_sequence + sequence).to(tl.int64)
        stored = tl.minimum(tl.load(num_filled + sequence).to(tl.int32), num_positions)
        q += sequence * q_strides[0] + head * q_strides[1]
        prefix_keys += caption * prefix_key_strides[0] + head * prefix_key_strides[2]
        prefix_values += caption * prefix_value_strides[0] + head * prefix_value_strides[2]
        keys += sequence * key_strides[0] + head * key_strides[2]
        values += sequence * value_strides[0] + head * value_strides[2]
        new_keys += sequence * new_key_strides[0] + head * new_key_strides[1]
        new_values += sequence * new_value_strides[0] + head * new_value_strides[1]
        if ALIGNED:
            q = tl.multiple_of(q, 16)
            prefix_keys, prefix_values = tl.multiple_of(prefix_keys, 16), tl.multiple_of(prefix_values, 16)
            keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
            new_keys, new_values = tl.multiple_of(new_keys, 16), tl.multiple_of(new_values, 16)
        dims = tl.arange(0, BLOCK_D)
        query = tl.load(q + dims, mask=dims < D, other=0).to(tl.float32) * scale  # (BLOCK_D,)
        filled, new_key, new_value = stored, query, query
        if APPEND:
            filled = tl.minimum(stored + 1, num_positions)
            new_key = tl.load(new_keys + dims, mask=dims < D, other=0)
            new_value = tl.load(new_values + dims, mask=dims < D, other=0)
            written = dims < tl.where(stored < num_positions, D, 0)  # a full sequence has no position to write
            tl.store(keys + stored.to(tl.int64) * key_strides[1] + dims, new_key, mask=written)
            tl.store(values + stored.to(tl.int64) * value_strides[1] + dims, new_value, mask=written)

        largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.float32)
        weighted = tl.zeros((BLOCK_D,), tl.float32)
        # Splits are loaded ahead; by itself Triton does that for matrix products alone.
        for start in tl.range(0, num_prefix, SPLIT, num_stages=3):
            largest, total, weighted = _fold_split(
                largest, total, weighted, query, prefix_keys, prefix_values,
                prefix_key_strides[1], prefix_value_strides[1], start, num_prefix, num_prefix, query, query,
                D, SPLIT, BLOCK_D, False,
            )  # fmt: skip
        for start in tl.range(0, filled, SPLIT, num_stages=3):
            largest, total, weighted = _fold_split(
                largest, total, weighted, query, keys, values,
                key_strides[1], value_strides[1], start, filled, stored, new_key, new_value,
                D, SPLIT, BLOCK_D, APPEND,
            )  # fmt: skip
        attended = (weighted / total).to(out.dtype.element_ty)
        tl.store(out + (sequence * H + head) * D + dims, attended, mask=dims < D)

    @triton.jit
    def _fold_split(  # type: ignore[no-untyped-def]
        largest, total, weighted, query, keys, values, key_stride, value_stride, start, end, stored, new_key, new_value,
        D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, APPEND: tl.constexpr,
    ):  # fmt: skip
        """(largest, total, weighted) with positions start .. min(start + SPLIT, end) - 1 folded in.

        Positions below `stored` are in memory. With APPEND, position `stored` is new_key and new_value.
        """
        positions, dims = start + tl.arange(0, SPLIT), tl.arange(0, BLOCK_D)
        inside = positions < end
        mask = (positions < stored)[:, None] & (dims < D)[None, :]
        k = tl.load(keys + positions[:, None] * key_stride + dims[None, :], mask=mask, other=0).to(tl.float32)
        v = tl.load(values + positions[:, None] * value_stride + dims[None, :], mask=mask, other=0).to(tl.float32)
        if APPEND:
            is_new = (positions == stored)[:, None]
            k = tl.where(is_new, new_key.to(tl.float32)[None, :], k)
            v = tl.where(is_new, new_value.to(tl.float32)[None, :], v)
        scores = tl.where(inside, tl.sum(k * query[None, :], axis=1), float("-inf"))  # (SPLIT,)
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest)
        total = total * shrink + tl.sum(weights, axis=0)
        weighted = weighted * shrink + tl.sum(weights[:, None] * v, axis=0)  # (BLOCK_D,)
        return new_largest, total, weighted
