"""A linear layer for few rows, fused with LayerNorm before it and GEGLU or the residual sum after it.

R rows, K inputs, N outputs.

With it a transformer layer of a decode step is five kernels:

    linear(norm) ── decode_attention ── linear(residual) ── linear(norm, gated) ── linear(residual)
        qkv          append, attend           out                  grow                shrink

At 16 rows a layer's limit is the read of its weights (29.4 MB, 6.8 us at 4.3 TB/s). So the product is W x^T: rows of
the weight are the M side of the matrix unit and the batch is the N side, padded to 16, 32, 64 or 128.

    norm    a program takes mean and variance from its rows itself, 2 KiB each and in L2: cheaper than a kernel
    gated   half of a program's weight rows are values, half are the gates of the same columns: no layout changes
    splits  a wide layer of few outputs (shrink: K = 4096, N = 1024) would keep 16 of an H100's 132 processors busy: K is
            split, a program's partial product goes to memory in float32, and the last of a tile's programs adds them up

A row's bits depend on that row alone:

* Tiles of the weight, tiles of K and splits follow (N, K, dtype). Only the tile of the batch follows R, and it is not
  a dimension that is summed over.
* Partial products are added in the order of their index, whichever program does it. No float is added atomically.
* Statistics are taken of 16 rows at a time for every tile of the batch: one shape, one order of sums.
* Multiplications and additions outside the matrix unit are not fused, which a compiler may do in one variant only.

An integer counter a tile tells which program is last. That one resets it to 0, so a launch leaves its counters as it
found them and a CUDA graph can be replayed. A second kernel in place of counters would be as safe, and cost another
1.3 us or more a layer (a launch inside a graph on an H100, as Hazy Research measured it).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, is_interpreted, words
from kernels.reference import Norm, Residual

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when the kernel is called
    triton = None

_STATISTICS_TILE = 1024  # inputs of a row at a time; 16 rows of them stay in registers between mean and variance
_STAGE_BYTES = 80 * 1024  # of shared memory for tiles in flight: 32 KB a processor keep an H100's memory busy
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: Residual | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """norm(x) weight^T + bias, then GEGLU or residual.x + residual.scale * it, as `kernels.reference.linear`.

    Sums are float32 and rounded once at the end; the normalised row is rounded to x's dtype, as a separate LayerNorm
    does it. Float32 products are exact (no TF32).

    Args:
        x: (R, K) float32, float16 or bfloat16. Rows may be strided, columns not.
        weight: (N, K) as nn.Linear has it; rows may be strided, columns not.
        bias: (N,), contiguous.
        norm: a LayerNorm of x's rows: weight and bias (K,), contiguous, and eps.
        gated: weight rows are [value: N/2 | gate: N/2]; the result is value * gelu(gate), erf.
        residual: x of the result's shape, rows may be strided, and scale, one number a column, contiguous.
        counters: (n,) int32 zeros, n at least `num_counters(R, N, K)`, left as zeros: one tensor serves all layers of a
            step, which saves each a memset. Launches that may run at the same time must not share it. None: made here.

        All of x's dtype (except counters) and device.

    Returns:
        (R, N) or, gated, (R, N/2), contiguous, of x's dtype. No argument is overwritten.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that needs a gradient.
        ImportError: triton is not installed.
    """
    _check(x, weight, bias, norm, gated, residual, counters)
    (R, K), N = x.shape, weight.shape[0]
    out = torch.empty(R, N // 2 if gated else N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tiling = _tiling(R, N, K, x.element_size())
    if tiling.splits == 1:
        partials = counters = out  # stand-ins that are never read, as others below
    else:
        programs = tiling.row_tiles * tiling.weight_tiles
        partials = torch.empty(
            tiling.splits * programs * tiling.weight_tile * tiling.row_tile, dtype=torch.float32, device=x.device
        )
        if counters is None:
            counters = torch.zeros(programs, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _linear_kernel[(tiling.row_tiles, tiling.weight_tiles, tiling.splits)](
            out, partials, counters, x, weight, weight if bias is None else bias,
            *((weight, weight) if norm is None else (norm.weight, norm.bias)),
            *((x, weight) if residual is None else residual),
            R, x.stride(0), weight.stride(0), 0 if residual is None else residual.x.stride(0),
            0.0 if norm is None else norm.eps,
            N=N, K=K, SPLITS=tiling.splits, K_SPLIT=tiling.k_split,
            BLOCK_N=tiling.weight_tile, BLOCK_R=tiling.row_tile, BLOCK_K=tiling.k_tile,
            BLOCK_STATISTICS=min(triton.next_power_of_2(K), _STATISTICS_TILE),
            HAS_BIAS=bias is not None, NORM=norm is not None, GATED=gated, RESIDUAL=residual is not None,
            ALIGN=_alignment(x, weight, None if residual is None else residual.x), WIDEN=is_interpreted(_linear_kernel),
            num_warps=4, num_stages=tiling.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def num_counters(num_rows: int, num_outputs: int, num_inputs: int) -> int:
    """How many counters `linear` needs for R rows, N outputs and K inputs; 0 where it does not split K."""
    tiling = _tiling(num_rows, num_outputs, num_inputs, element_bytes=2)
    return tiling.row_tiles * tiling.weight_tiles if tiling.splits > 1 else 0


class _Tiling(NamedTuple):
    """How a product is tiled. What decides a row's bits (weight_tile, k_tile, splits, k_split) does not follow R."""

    row_tile: int
    row_tiles: int
    weight_tile: int
    weight_tiles: int
    k_tile: int
    splits: int
    k_split: int  # inputs of a split
    num_stages: int  # tiles of K in flight


def _tiling(R: int, N: int, K: int, element_bytes: int) -> _Tiling:
    """The published layers have 48 (qkv), 32 (out), 128 (grow) and 16 x 8 splits (shrink) programs a tile of rows.

    Of 64 weight rows Hopper's wgmma makes the product, of 32 mma.sync, which is slower for many rows and gives a
    layer of few outputs twice the programs, without the detour through memory that a split takes.
    """
    k_tile = 128 // element_bytes  # 128 bytes
    weight_tile = 64 if N >= 4096 or K >= 2048 else 32
    weight_tiles, k_tiles = -(-N // weight_tile), -(-K // k_tile)
    splits = 1
    while K >= 2048 and 2 * splits * weight_tiles <= 128 and 2 * splits * 512 <= K:
        splits *= 2
    row_tile = 16 if R <= 16 else 32 if R <= 32 else 64 if R <= 64 else 128
    k_tiles_split = -(-k_tiles // splits)
    stages = min(_STAGE_BYTES // (128 * (weight_tile + row_tile)), k_tiles_split)
    return _Tiling(
        row_tile, -(-R // row_tile), weight_tile, weight_tiles, k_tile, splits, k_tiles_split * k_tile, stages
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gated: bool,
    residual: Residual | None,
    counters: Tensor | None,
) -> None:
    if x.dim() != 2 or x.dtype not in _DTYPES or x.shape[1] == 0:
        raise ValueError(f"x: {words(x)}; must be (R, K) float32, float16 or bfloat16")
    R, K = x.shape
    if weight.dim() != 2 or weight.shape[1] != K or weight.shape[0] == 0 or weight.dtype != x.dtype:
        raise ValueError(f"weight: {words(weight)}; must be (N, {K}) {x.dtype}")
    N = weight.shape[0]
    if gated and N % 2:
        raise ValueError(f"weight: {words(weight)}; gated, its rows are values and as many gates")
    width = N // 2 if gated else N
    matrices = {"x": x, "weight": weight}
    vectors = {"bias": (bias, N)}
    if norm is not None:
        vectors |= {"norm.weight": (norm.weight, K), "norm.bias": (norm.bias, K)}
    if residual is not None:
        matrices["residual.x"] = residual.x
        vectors["residual.scale"] = (residual.scale, width)
        if residual.x.shape != (R, width) or residual.x.dtype != x.dtype:
            raise ValueError(f"residual.x: {words(residual.x)}; must be ({R}, {width}) {x.dtype}")
    for name, (vector, size) in vectors.items():
        if vector is not None and (vector.shape != (size,) or vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(f"{name}: {words(vector)}; must be ({size},) {x.dtype}, contiguous")
    for name, matrix in matrices.items():
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ValueError(f"{name}: {words(matrix)}; columns must be contiguous")
    floats = {**matrices, **{name: vector for name, (vector, _) in vectors.items()}}
    check_beside("x", x, floats)
    check_no_gradient(floats)
    _check_counters(counters, num_counters(R, N, K), x)
    check_runs("kernels.linear", "x", x, triton and _linear_kernel, reference="kernels.reference.linear")


def _check_counters(counters: Tensor | None, wanted: int, x: Tensor) -> None:
    if counters is None:
        return
    if counters.dim() != 1 or counters.dtype != torch.int32 or not counters.is_contiguous():
        raise ValueError(f"counters: {words(counters)}; must be ({wanted},) int32, contiguous")
    if counters.shape[0] < wanted:
        raise ValueError(f"counters: has {counters.shape[0]}; must have {wanted} (see num_counters)")
    check_beside("x", x, {"counters": counters})


def _alignment(*matrices: Tensor | None) -> int:
    """The alignment of every row's first element that the compiler may assume, in elements: 16 bytes or 1 element.

    Load width follows from this, and with it the order of the sums of a norm. Left to itself the compiler looks at the
    first row only, which for an odd K is aligned where the next is not.
    """
    given = [matrix for matrix in matrices if matrix is not None]
    is_aligned = all(
        matrix.data_ptr() % 16 == 0 and size * matrix.element_size() % 16 == 0
        for matrix in given
        for size in (matrix.stride(0), matrix.shape[1])
    )
    return 16 // given[0].element_size() if is_aligned else 1


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows", "x_stride", "weight_stride", "stream_stride"])
    def _linear_kernel(  # type: ignore[no-untyped-def]
        out, partials, counters, x, weight, bias, norm_weight, norm_bias, stream, scale,
        num_rows, x_stride, weight_stride, stream_stride, eps,
        N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, K_SPLIT: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_STATISTICS: tl.constexpr,
        HAS_BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
        ALIGN: tl.constexpr, WIDEN: tl.constexpr,
    ):  # fmt: skip
        # Row tiles first: those that read the same weights run at the same time.
        row_tile, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        row_inside = rows < num_rows
        weight_rows, weight_inside = _weight_rows(tile, N, BLOCK_N, GATED)
        x_offsets = tl.multiple_of(rows.to(tl.int64) * x_stride, ALIGN)
        weight_offsets = tl.multiple_of(weight_rows.to(tl.int64) * weight_stride, ALIGN)
        if NORM:
            mean, inverse_std = _statistics(
                x, row_tile * BLOCK_R, num_rows, x_stride, eps, K, BLOCK_R, BLOCK_STATISTICS, ALIGN
            )
        product = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(split * K_SPLIT, split * K_SPLIT + K_SPLIT, BLOCK_K):
            channels = start + tl.arange(0, BLOCK_K)
            inside = channels < K
            w = tl.load(
                weight + weight_offsets[:, None] + channels[None, :],
                mask=weight_inside[:, None] & inside[None, :],
                other=0,
            )  # (BLOCK_N, BLOCK_K)
            h = tl.load(
                x + x_offsets[None, :] + channels[:, None], mask=row_inside[None, :] & inside[:, None], other=0
            )  # (BLOCK_K, BLOCK_R)
            if NORM:
                gain = tl.load(norm_weight + channels, mask=inside, other=0).to(tl.float32)
                shift = tl.load(norm_bias + channels, mask=inside, other=0).to(tl.float32)
                normed = (h.to(tl.float32) - mean[None, :]) * inverse_std[None, :] * gain[:, None] + shift[:, None]
                h = normed.to(x.dtype.element_ty)
            if WIDEN:  # Triton's interpreter (3.6 and 3.9) multiplies bfloat16 as the integers of its bits
                w, h = w.to(tl.float32), h.to(tl.float32)
            product = tl.dot(w, h, product, input_precision="ieee")
        if SPLITS == 1:
            _finish(
                product, tile, rows, row_inside, out, bias, stream, scale, stream_stride,
                N, BLOCK_N, HAS_BIAS, GATED, RESIDUAL, ALIGN,
            )  # fmt: skip
        else:
            place = (tile * tl.num_programs(0) + row_tile).to(tl.int64)
            cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
            partials += place * (SPLITS * BLOCK_N * BLOCK_R)
            tl.store(partials + split * (BLOCK_N * BLOCK_R) + cells, product)
            tl.debug_barrier()  # all threads have stored their part before one of them counts
            if tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
                tl.store(counters + place, 0)
                # .cg: from L2, where other processors' stores are, never from this one's L1
                total = tl.load(partials + cells, cache_modifier=".cg")
                for other in tl.static_range(1, SPLITS):
                    total += tl.load(partials + other * (BLOCK_N * BLOCK_R) + cells, cache_modifier=".cg")
                _finish(
                    total, tile, rows, row_inside, out, bias, stream, scale, stream_stride,
                    N, BLOCK_N, HAS_BIAS, GATED, RESIDUAL, ALIGN,
                )  # fmt: skip

    @triton.jit
    def _weight_rows(tile, N: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows of the weight that a program multiplies: gated, BLOCK_N / 2 of the values and then their gates."""
        slots = tl.arange(0, BLOCK_N)
        if GATED:
            columns = tile * (BLOCK_N // 2) + slots % (BLOCK_N // 2)
            return columns + (slots // (BLOCK_N // 2)) * (N // 2), columns < N // 2
        else:
            return tile * BLOCK_N + slots, tile * BLOCK_N + slots < N

    @triton.jit
    def _statistics(  # type: ignore[no-untyped-def]
        x, first_row, num_rows, x_stride, eps,
        K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    ):  # fmt: skip
        """(mean, 1 / standard deviation) of BLOCK_R rows, (BLOCK_R,) each."""
        GROUPS: tl.constexpr = BLOCK_R // 16
        group_ids = tl.arange(0, GROUPS)[:, None]
        means, inverse_stds = tl.zeros((GROUPS, 16), tl.float32), tl.zeros((GROUPS, 16), tl.float32)
        for group in range(0, GROUPS):
            rows = first_row + group * 16 + tl.arange(0, 16)
            row_inside = rows < num_rows
            pointers = x + tl.multiple_of(rows.to(tl.int64) * x_stride, ALIGN)[:, None]
            mean = tl.zeros((16,), tl.float32)
            for start in range(0, K, BLOCK):
                channels = start + tl.arange(0, BLOCK)[None, :]
                part = tl.load(pointers + channels, mask=row_inside[:, None] & (channels < K), other=0)
                mean += tl.sum(part.to(tl.float32), axis=1)
            mean /= K
            variance = tl.zeros((16,), tl.float32)
            for start in range(0, K, BLOCK):
                channels = start + tl.arange(0, BLOCK)[None, :]
                part = tl.load(pointers + channels, mask=row_inside[:, None] & (channels < K), other=0)
                centred = tl.where(channels < K, part.to(tl.float32) - mean[:, None], 0.0)
                variance += tl.sum(centred * centred, axis=1)
            inverse_std = tl.rsqrt(variance / K + eps)
            means = tl.where(group_ids == group, mean[None, :], means)
            inverse_stds = tl.where(group_ids == group, inverse_std[None, :], inverse_stds)
        return tl.reshape(means, (BLOCK_R,)), tl.reshape(inverse_stds, (BLOCK_R,))

    @triton.jit
    def _finish(  # type: ignore[no-untyped-def]
        product, tile, rows, row_inside, out, bias, stream, scale, stream_stride,
        N: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
        ALIGN: tl.constexpr,
    ):  # fmt: skip
        """Bias, GEGLU, residual sum and store of a whole product (BLOCK_N, BLOCK_R)."""
        WIDTH: tl.constexpr = N // 2 if GATED else N
        weight_rows, weight_inside = _weight_rows(tile, N, BLOCK_N, GATED)
        if HAS_BIAS:
            product += tl.load(bias + weight_rows, mask=weight_inside, other=0).to(tl.float32)[:, None]
        if GATED:
            columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            pairs = tl.permute(tl.reshape(product, (2, BLOCK_N // 2, product.shape[1])), (1, 2, 0))
            value, gate = tl.split(pairs)  # (BLOCK_N / 2, BLOCK_R)
            result = value * (gate * 0.5 * (1.0 + tl.erf(gate * 0.70710678118654752)))
        else:
            columns, result = weight_rows, product
        inside = (columns < WIDTH)[:, None] & row_inside[None, :]
        if RESIDUAL:
            factor = tl.load(scale + columns, mask=columns < WIDTH, other=0).to(tl.float32)
            offsets = tl.multiple_of(rows.to(tl.int64) * stream_stride, ALIGN)
            before = tl.load(stream + offsets[None, :] + columns[:, None], mask=inside, other=0)
            result = before.to(tl.float32) + factor[:, None] * result
        pointers = out + rows.to(tl.int64)[None, :] * WIDTH + columns[:, None]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
