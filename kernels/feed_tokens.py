"""From sampled tokens to the layers' next input: init tokens, the record, embedding and positions, in one launch.

S slots, R slots computed (the first R), N image tokens, V image vocabulary, C model dim.

    of slot r at position p:
    token          = init_tokens[source[r], p], or sampled[source[r]] where that is -1
    tokens[r, p]   = token                                              p = N: a column that is never read
    x[r]           = embedding[token] + position_table[p]
    positions[r]   = p + 1, at most N

`source` is r itself, or of an unconditional sequence the slot of the conditional one. This is what a step does besides
the layers and the head; as separate operations it is some ten launches of a few bytes each. Positions live on the
device and count themselves on, so that a step is the same program every time and the host need not read them.

Finished sequences and free slots run on: their position stays at N, their token goes to column N, and their input is
that of the last position that has one. No index that a slot can hold, stale ones included, reaches outside a tensor:
sources are kept below R and tokens below V.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when the kernel is called
    triton = None

_DIM_MAX = 16384
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def feed_tokens(
    sampled: Tensor,
    source: Tensor,
    init_tokens: Tensor,
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    position_table: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference_slots.feed_tokens`; writes to `tokens` and `positions`.

    Args:
        sampled: (R,) int64 token ids.
        source: (R,) int64: the slot whose token this one is fed; taken as R - 1 where it is more.
        init_tokens: (S, N) int64, R at most S: tokens that are given instead of sampled, -1 where to sample.
        tokens: (S, N + 1) int64, written in column `positions`.
        positions: (R,) int64 in [0, N], written.
        embedding: (V, C) float32, float16 or bfloat16.
        position_table: (N, C) of embedding's dtype.

        Rows of `init_tokens`, `tokens` and the tables may be strided, their columns not; values are not checked.

    Returns:
        (R, C) in embedding's dtype: the layers' input; and (R,) int64: how many tokens the layers read before it, the
        position kept at N - 2 or less.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that needs a gradient.
        ImportError: triton is not installed.
    """
    _check(sampled, source, init_tokens, tokens, positions, embedding, position_table)
    R, (V, C), N = sampled.shape[0], embedding.shape, init_tokens.shape[1]
    x = torch.empty(R, C, dtype=embedding.dtype, device=embedding.device)
    num_read = torch.empty(R, dtype=torch.int64, device=embedding.device)
    if R == 0:
        return x, num_read
    with torch.cuda.device_of(embedding):
        _feed_tokens_kernel[(R,)](
            x, num_read, sampled, source, init_tokens, tokens, positions, embedding, position_table, R,
            init_tokens.stride(0), tokens.stride(0), embedding.stride(0), position_table.stride(0),
            N=N, LAST_READ=max(N - 2, 0), V=V, C=C, BLOCK=triton.next_power_of_2(C), num_warps=1,
        )  # fmt: skip
    return x, num_read


def _check(
    sampled: Tensor,
    source: Tensor,
    init_tokens: Tensor,
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    position_table: Tensor,
) -> None:
    if embedding.dim() != 2 or embedding.dtype not in _DTYPES or not 0 < embedding.shape[1] <= _DIM_MAX:
        raise ValueError(f"embedding: {words(embedding)}; must be (V, C) float32, float16 or bfloat16")
    if init_tokens.dim() != 2 or init_tokens.shape[1] == 0 or init_tokens.dtype != torch.int64:
        raise ValueError(f"init_tokens: {words(init_tokens)}; must be (S, N) int64")
    (R, C), (S, N) = (sampled.numel(), embedding.shape[1]), init_tokens.shape
    if tokens.shape != (S, N + 1) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: {words(tokens)}; must be ({S}, {N + 1}) int64")
    if position_table.shape != (N, C) or position_table.dtype != embedding.dtype:
        raise ValueError(f"position_table: {words(position_table)}; must be ({N}, {C}) {embedding.dtype}")
    for name, tensor in {"sampled": sampled, "source": source, "positions": positions}.items():
        if tensor.shape != (R,) or R > S or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {words(tensor)}; must be (R,) int64 with R at most {S}, contiguous")
    tables = {"init_tokens": init_tokens, "tokens": tokens, "embedding": embedding, "position_table": position_table}
    for name, tensor in tables.items():
        if tensor.stride(1) != 1:
            raise ValueError(f"{name}: {words(tensor)}; columns must be contiguous")
    check_no_gradient(tables)
    check_beside("embedding", embedding, {**tables, "sampled": sampled, "source": source, "positions": positions})
    check_runs(
        "kernels.feed_tokens",
        "embedding",
        embedding,
        triton and _feed_tokens_kernel,
        reference="kernels.reference_slots.feed_tokens",
    )


if triton is not None:
    # One warp: a program reads its position and then writes it, and warps of a program are not synchronised.
    @triton.jit(do_not_specialize=["num_rows"])
    def _feed_tokens_kernel(  # type: ignore[no-untyped-def]
        x, num_read, sampled, source, init_tokens, tokens, positions, embedding, position_table, num_rows,
        init_tokens_stride, tokens_stride, embedding_stride, position_stride,
        N: tl.constexpr, LAST_READ: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        position = tl.load(positions + row)
        source_row = tl.minimum(tl.load(source + row), num_rows - 1)
        token = tl.load(init_tokens + source_row * init_tokens_stride + tl.minimum(position, N - 1))
        token = tl.where(token >= 0, token, tl.load(sampled + source_row))
        token = tl.minimum(tl.maximum(token, 0), V - 1)
        read = tl.minimum(position, LAST_READ)
        channels = tl.arange(0, BLOCK)
        inside = channels < C
        embedded = tl.load(embedding + token * embedding_stride + channels, mask=inside, other=0).to(tl.float32)
        place = tl.load(position_table + read * position_stride + channels, mask=inside, other=0).to(tl.float32)
        tl.store(x + row * C + channels, (embedded + place).to(x.dtype.element_ty), mask=inside)
        tl.store(num_read + row, read)
        tl.store(tokens + row * tokens_stride + position, token)
        tl.store(positions + row, tl.minimum(position + 1, N))
