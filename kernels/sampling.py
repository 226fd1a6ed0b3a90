"""One token a sequence: temperature, top-k, top-p and Gumbel noise in one kernel, or the head and sampling.

B sequences, V vocabulary, C model dim, R sequences a tile.

The definition is `kernels.reference.sample`; this file is the same function for CUDA.

    sample          logits (B, V) -> tokens. One program a sequence, its logits in registers, read once.
    head_sample     hidden (B, C) -> tokens, no top-k and no top-p. Logits never leave the chip: a program computes a
                    tile of 128 tokens x R sequences, adds the noise and keeps one (score, id) a sequence; a second
                    kernel takes the best of a sequence's tiles.

* Noise is keyed by (seed, candidate, position, token id), so a sequence gets the same token in any batch.
* Thresholds come without a sort. Floats in order are 32-bit integers in order, so the k-th largest logit is found by
  halving an integer interval: at most 32 counts over registers, where PyTorch's top-k of 32,768 takes 94 to 1,200 us
  (vLLM #51507). For top-p the counts are sums of fixed-point mass in int64. Integer sums have no order to depend on.
* Every parameter is read from the device by the sequence that it concerns: no host sync, fit for a CUDA graph, and a
  sequence without a filter pays nothing for those of others.
* Multiplications and additions are not fused (`enable_fp_fusion=False`) and divisions are rounded as IEEE has it:
  scores then agree with the reference's except for the last bit of exp and log.

The vocabulary decides the block sizes. Only R follows the batch, and R is not a dimension that is summed over.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_runs, is_interpreted, words

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when a kernel is called
    triton = None

_VOCABULARY_MAX = 65536  # what a program can hold in registers, spilling some
_HEAD_TILE = 128  # tokens a program: V = 16,384 is one wave on the 132 processors of an H100
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample(
    logits: Tensor,
    seeds: Tensor,
    candidates: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
) -> Tensor:
    """Samples one token a sequence, as `kernels.reference.sample` does.

    Args:
        logits: (B, V) float32, float16 or bfloat16, any strides; V at most 65,536.
        seeds, candidates, positions: (B,) int64, see `reference.gumbel_noise`.
        temperature: (B,) float32; 0 takes the argmax, ties to the lowest id.
        top_k: (B,) int64; 0, or V and more: off.
        top_p: (B,) float32 in (0, 1]; 1: off.

    Returns:
        (B,) int64 token ids.

    Raises:
        ValueError: a tensor of another shape, dtype or device; values are not checked, which would wait for them.
        ImportError: triton is not installed.
    """
    if logits.dim() != 2 or logits.dtype not in _DTYPES:
        raise ValueError(f"logits: {words(logits)}; must be (B, V) float32, float16 or bfloat16")
    B, V = logits.shape
    if not 0 < V <= _VOCABULARY_MAX:
        raise ValueError(f"logits: V = {V}; must be 1 to {_VOCABULARY_MAX}")
    _check_rows(logits, seeds=seeds, candidates=candidates, positions=positions, top_k=top_k)
    _check_rows(logits, torch.float32, temperature=temperature, top_p=top_p)
    check_runs(
        "kernels.sampling.sample", "logits", logits, triton and _sample_kernel, reference="kernels.reference.sample"
    )
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B == 0:
        return tokens
    block = max(triton.next_power_of_2(V), 4)
    with torch.cuda.device_of(logits):
        _sample_kernel[(B,)](
            tokens, logits, seeds, candidates, positions, temperature, top_k, top_p, *logits.stride(),
            V=V, BLOCK=block, num_warps=min(max(block // 1024, 4), 32), enable_fp_fusion=False,
        )  # fmt: skip
    return tokens


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    seeds: Tensor,
    candidates: Tensor,
    positions: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Samples one token a sequence from softmax((hidden weight^T + bias) / temperature), logits kept in float32.

    For guidance, guide `hidden`: the head is linear, so null + g * (hidden - null) has the guided logits.

    Args:
        hidden: (B, C) float32, float16 or bfloat16, normalised; rows may be strided, columns not.
        weight: (V, C); rows may be strided, columns not. Float32 products are exact (no TF32).
        bias: (V,), contiguous.
        seeds, candidates, positions: (B,) int64, see `reference.gumbel_noise`.
        temperature: (B,) float32; 0 takes the argmax, ties to the lowest id.

    Returns:
        (B,) int64 token ids.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout.
        ImportError: triton is not installed.
    """
    if hidden.dim() != 2 or hidden.dtype not in _DTYPES or hidden.stride(1) != 1:
        raise ValueError(f"hidden: {words(hidden)}; must be (B, C) float32, float16 or bfloat16, columns contiguous")
    (B, C), V = hidden.shape, weight.shape[0]
    if not 0 < V <= _VOCABULARY_MAX:
        raise ValueError(f"weight: V = {V}; must be 1 to {_VOCABULARY_MAX}")
    if weight.shape != (V, C) or weight.dtype != hidden.dtype or weight.stride(1) != 1:
        raise ValueError(f"weight: {words(weight)}; must be (V, {C}) {hidden.dtype}, columns contiguous")
    if bias.shape != (V,) or bias.dtype != hidden.dtype or not bias.is_contiguous():
        raise ValueError(f"bias: {words(bias)}; must be ({V},) {hidden.dtype}, contiguous")
    check_beside("the others", hidden, {"weight": weight, "bias": bias})
    _check_rows(hidden, seeds=seeds, candidates=candidates, positions=positions)
    _check_rows(hidden, torch.float32, temperature=temperature)
    check_runs(
        "kernels.sampling.head_sample", "hidden", hidden, triton and _head_kernel, reference="kernels.reference.sample"
    )
    tokens = torch.empty(B, dtype=torch.int64, device=hidden.device)
    if B == 0:
        return tokens
    num_tiles, row_tile = triton.cdiv(V, _HEAD_TILE), _row_tile(B)
    best_scores = torch.empty(num_tiles, B, dtype=torch.float32, device=hidden.device)
    best_ids = torch.empty(num_tiles, B, dtype=torch.int32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _head_kernel[(num_tiles, triton.cdiv(B, row_tile))](
            best_scores, best_ids, hidden, weight, bias, seeds, candidates, positions, temperature,
            B, hidden.stride(0), weight.stride(0),
            C=C, V=V, BLOCK_V=_HEAD_TILE, BLOCK_B=row_tile, BLOCK_C=32 if hidden.dtype == torch.float32 else 64,
            WIDEN=is_interpreted(_head_kernel),
            num_warps=4 if row_tile == 16 else 8, num_stages=4, enable_fp_fusion=False,
        )  # fmt: skip
        _best_tile_kernel[(B,)](
            tokens, best_scores, best_ids, B, NUM_TILES=num_tiles, BLOCK=triton.next_power_of_2(num_tiles), num_warps=1
        )
    return tokens


def _row_tile(num_rows: int) -> int:
    """Sequences of a head program: few tiles, since each reads the whole weight again (from L2).

    Sequences are the N side of the product (weight rows are M, always 128 of them), so every tile size runs the same
    instructions over the same channels in the same order and a sequence's bits stay the same.
    """
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64


def _check_rows(like: Tensor, dtype: torch.dtype = torch.int64, **tensors: Tensor) -> None:
    """Raises unless each tensor is a contiguous (B,) of `dtype` beside `like`."""
    for name, tensor in tensors.items():
        if tensor.shape != like.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {words(tensor)}; must be ({like.shape[0]},) {dtype}, contiguous")
    check_beside("the others", like, tensors)


if triton is not None:

    @triton.jit
    def _sample_kernel(  # type: ignore[no-untyped-def]
        tokens, logits, seeds, candidates, positions, temperature, top_k, top_p, row_stride, token_stride,
        V: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        ids = tl.arange(0, BLOCK)
        inside = ids < V
        scores = tl.load(logits + row * row_stride + ids * token_stride, mask=inside, other=0).to(tl.float32)
        scores = tl.where(inside, scores, float("-inf"))  # (BLOCK,)
        heat = tl.load(temperature + row)
        if heat > 0:
            scores = tl.div_rn(scores, heat)
            k = tl.load(top_k + row)
            if (k > 0) & (k < V):
                scores = _keep_top_k(scores, k.to(tl.int32))
            p = tl.load(top_p + row)
            if p < 1:
                scores = _keep_top_p(scores, p)
            seed, candidate, position = tl.load(seeds + row), tl.load(candidates + row), tl.load(positions + row)
            scores += _gumbel_noise(seed, candidate, position, tl.arange(0, BLOCK // 4))
        tl.store(tokens + row, tl.argmax(scores, axis=0).to(tl.int64))  # the first of equals

    @triton.jit
    def _keep_top_k(scores, k):  # type: ignore[no-untyped-def]
        """-inf for what lies below the k-th largest."""
        low, high = _key(tl.full((), float("-inf"), tl.float32)), _key(tl.max(scores, axis=0))
        while low < high:  # the k-th largest has its key in low .. high
            middle = low + ((high - low + 1) >> 1)
            count = tl.sum((scores >= _value(middle)).to(tl.int32), axis=0)
            # Exactly k: any threshold between the k-th largest and the next one will do.
            high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
            low = tl.where(count >= k, middle, low)
        return tl.where(scores >= _value(low), scores, float("-inf"))

    @triton.jit
    def _keep_top_p(scores, p):  # type: ignore[no-untyped-def]
        """-inf for what is not needed to reach the share p of the mass; see `reference._top_p_threshold`."""
        largest = tl.max(scores, axis=0)
        mass = tl.exp(scores - largest) * 1099511627776.0  # 2^40
        # Adding and subtracting 2^23 rounds a smaller float32 to an integer, halves to even; larger ones are integers.
        mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass).to(tl.int64)
        wanted = p.to(tl.float64) * tl.sum(mass, axis=0).to(tl.float64)
        low, high = _key(tl.full((), float("-inf"), tl.float32)), _key(largest)
        while low < high:  # the smallest score kept has its key in low .. high
            middle = low + ((high - low + 1) >> 1)
            reached = tl.sum(tl.where(scores >= _value(middle), mass, 0), axis=0)
            enough = reached.to(tl.float64) >= wanted
            high = tl.where(enough, high, middle - 1)
            low = tl.where(enough, middle, low)
        return tl.where(scores >= _value(low), scores, float("-inf"))

    @triton.jit
    def _key(value):  # type: ignore[no-untyped-def]
        """float32 -> uint32, order preserved."""
        bits = value.to(tl.uint32, bitcast=True)
        return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)

    @triton.jit
    def _value(key):  # type: ignore[no-untyped-def]
        """`_key` undone. Scores are compared as floats, so that -0 and 0 tie as they do for the reference."""
        return tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)

    @triton.jit
    def _gumbel_noise(seed, candidate, position, calls):  # type: ignore[no-untyped-def]
        """Noise (..., 4 n) of Philox calls (..., n): tokens 4 * call to 4 * call + 3."""
        lane_0, lane_1, lane_2, lane_3 = tl.philox(
            seed, calls.to(tl.uint32), position.to(tl.uint32), candidate.to(tl.uint32), tl.full((), 0, tl.uint32)
        )
        bits = tl.interleave(tl.interleave(lane_0, lane_2), tl.interleave(lane_1, lane_3))
        # As `reference._to_gumbel`: (bits + 1/2) / 2^32, kept at or below 1 - 2^-24
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
        rest = 1.0 - uniform
        # log1p(-u) = log(w) u / (1 - w) with w = 1 - u as rounded: the quotient restores what the rounding lost.
        lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
        exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * tl.div_rn(uniform, lost))
        return -tl.log(exponential)

    # The number of rows is not a constant of the compiled kernel: 1, 16 and 17 rows run the same one.
    @triton.jit(do_not_specialize=["num_rows"])
    def _head_kernel(  # type: ignore[no-untyped-def]
        best_scores, best_ids, hidden, weight, bias, seeds, candidates, positions, temperature,
        num_rows, hidden_stride, weight_stride,
        C: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
        WIDEN: tl.constexpr,
    ):  # fmt: skip
        tile = tl.program_id(0)
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
        token_inside, row_inside = ids < V, rows < num_rows
        logits = tl.zeros((BLOCK_V, BLOCK_B), tl.float32)
        for start in range(0, C, BLOCK_C):
            channels = start + tl.arange(0, BLOCK_C)
            channel_inside = channels < C
            w = tl.load(
                weight + ids.to(tl.int64)[:, None] * weight_stride + channels[None, :],
                mask=token_inside[:, None] & channel_inside[None, :],
                other=0,
            )  # (BLOCK_V, BLOCK_C)
            h = tl.load(
                hidden + rows.to(tl.int64)[None, :] * hidden_stride + channels[:, None],
                mask=row_inside[None, :] & channel_inside[:, None],
                other=0,
            )  # (BLOCK_C, BLOCK_B)
            if WIDEN:  # Triton's interpreter (3.6 and 3.9) multiplies bfloat16 as the integers of its bits
                w, h = w.to(tl.float32), h.to(tl.float32)
            logits = tl.dot(w, h, logits, input_precision="ieee")
        logits += tl.load(bias + ids, mask=token_inside, other=0).to(tl.float32)[:, None]
        heat = tl.load(temperature + rows, mask=row_inside, other=0)
        noise = _gumbel_noise(
            tl.load(seeds + rows, mask=row_inside, other=0)[:, None],
            tl.load(candidates + rows, mask=row_inside, other=0)[:, None],
            tl.load(positions + rows, mask=row_inside, other=0)[:, None],
            (tile * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4))[None, :],
        )  # (BLOCK_B, BLOCK_V)
        random = (heat > 0)[None, :]
        scores = tl.where(random, tl.div_rn(logits, tl.where(heat > 0, heat, 1.0)[None, :]) + tl.trans(noise), logits)
        scores = tl.where(token_inside[:, None], scores, float("-inf"))
        best, place = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)  # (BLOCK_B,)
        offsets = tile.to(tl.int64) * num_rows + rows
        tl.store(best_scores + offsets, best, mask=row_inside)
        tl.store(best_ids + offsets, tile * BLOCK_V + place, mask=row_inside)

    @triton.jit(do_not_specialize=["num_rows"])
    def _best_tile_kernel(  # type: ignore[no-untyped-def]
        tokens, best_scores, best_ids, num_rows, NUM_TILES: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0)
        tiles = tl.arange(0, BLOCK)
        scores = tl.load(best_scores + tiles * num_rows + row, mask=tiles < NUM_TILES, other=float("-inf"))
        # Tiles hold ascending ids, so the first of equal tiles holds the lowest.
        best = tl.minimum(tl.argmax(scores, axis=0), NUM_TILES - 1)  # of NaNs any, but a valid one
        tl.store(tokens + row, tl.load(best_ids + best * num_rows + row).to(tl.int64))
