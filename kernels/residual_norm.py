"""The sum of the residual stream and a scaled branch, and the LayerNorm that reads it next, in one pass.

R rows (all leading dimensions), C model dim.

    y = x + scale * (branch + branch_bias)        normed = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias

A step of the sampler does this twice a layer on 2 KiB rows; apart it is three launches (scale, sum, norm), each
longer than its work. One program a row, the row in registers: its sums have one shape, so a row has the same bits
alone and among any others.

Everything is float32 inside. The mean and variance are those of y as it is returned (rounded to its dtype), so that
`normed` is what a separate LayerNorm would make of it; the variance is the mean of squared distances, not the
difference of two large numbers.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # said when the kernel is called
    triton = None

_DIM_MAX = 16384  # a row stays in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, LayerNorm(y)) with y = x + scale * (branch + branch_bias), as `kernels.reference.residual_norm`.

    Args:
        x: (..., C) float32, float16 or bfloat16; C at most 16,384. Rows may be strided, channels not.
        branch: like x; None: y is x, and this is LayerNorm alone.
        scale: (C,) LayerScale; given with `branch`, and only with it.
        weight, bias: (C,) of the norm.
        eps: added to the variance.
        branch_bias: (C,), the bias that the branch's last linear layer left out.

        All of one dtype and device.

    Returns:
        y and normed, x's shape and dtype, contiguous; y is x itself where there is no branch.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that wants a gradient.
        ImportError: triton is not installed.
    """
    _check(x, branch, scale, weight, bias, branch_bias)
    C = x.shape[-1]
    rows = x.reshape(-1, C)  # (R, C): a view where the strides allow it
    branch_rows = None if branch is None else branch.reshape(-1, C)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = x if branch is None else torch.empty_like(normed)
    if x.numel() == 0:
        return y, normed
    block = triton.next_power_of_2(C)
    with torch.cuda.device_of(x):
        _residual_norm_kernel[(rows.shape[0],)](
            # What is not given has a stand-in that is never read.
            y, normed, rows, rows if branch_rows is None else branch_rows,
            weight if scale is None else scale, weight if branch_bias is None else branch_bias, weight, bias,
            _stride(rows), 0 if branch_rows is None else _stride(branch_rows), eps,
            C=C, BLOCK=block, HAS_BRANCH=branch is not None, HAS_BRANCH_BIAS=branch_bias is not None,
            ALIGNED=_aligned(x, branch),
            num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return y, normed


def _check(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None
) -> None:
    if x.dim() == 0 or x.dtype not in _DTYPES or not 0 < x.shape[-1] <= _DIM_MAX:
        raise ValueError(f"x: {words(x)}; must be (..., C) float32, float16 or bfloat16, C at most {_DIM_MAX}")
    C = x.shape[-1]
    if (branch is None) != (scale is None):
        raise ValueError("branch and scale: give both or neither")
    if branch is None and branch_bias is not None:
        raise ValueError("branch_bias: is given without a branch")
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"branch: {words(branch)}; must be as x, {words(x)}")
    for name, tensor in {"scale": scale, "weight": weight, "bias": bias, "branch_bias": branch_bias}.items():
        if tensor is not None and (tensor.shape != (C,) or tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: {words(tensor)}; must be ({C},) {x.dtype}, contiguous")
    for name, tensor in {"x": x, "branch": branch}.items():
        if tensor is not None and tensor.stride(-1) != 1 and C > 1:
            raise ValueError(f"{name}: {words(tensor)}; channels must lie together in memory: make it contiguous")
    named = {"x": x, "branch": branch, "scale": scale, "weight": weight, "bias": bias, "branch_bias": branch_bias}
    check_beside("x", x, named)
    check_no_gradient(named)
    check_runs(
        "kernels.residual_norm", "x", x, triton and _residual_norm_kernel, reference="kernels.reference.residual_norm"
    )


def _stride(rows: Tensor) -> int:
    """From row to row; of a single row, where it may be anything, 0."""
    return 0 if rows.shape[0] == 1 else rows.stride(0)


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of these starts at a multiple of 16 bytes.

    The compiler picks load width from this, and with it the order of the sums. Left to itself it looks at the first
    element only, which for an odd C is aligned in one row and not in the next.
    """
    return all(
        stride * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
        if tensor is not None
        for stride in (tensor.shape[-1], *tensor.stride()[:-1])
    )


if triton is not None:

    @triton.jit(
        do_not_specialize=["row_stride", "branch_stride"],
        do_not_specialize_on_alignment=["y", "normed", "x", "branch"],
    )
    def _residual_norm_kernel(  # type: ignore[no-untyped-def]
        y, normed, x, branch, scale, branch_bias, weight, bias, row_stride, branch_stride, eps,
        C: tl.constexpr, BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr,
        ALIGNED: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK)
        inside = channels < C
        x += row * row_stride
        branch += row * branch_stride
        y += row * C
        normed += row * C
        if ALIGNED:
            x, branch = tl.multiple_of(x, 16), tl.multiple_of(branch, 16)
            y, normed = tl.multiple_of(y, 16), tl.multiple_of(normed, 16)
        stream = tl.load(x + channels, mask=inside, other=0).to(tl.float32)  # (BLOCK,)
        if HAS_BRANCH:
            added = tl.load(branch + channels, mask=inside, other=0).to(tl.float32)
            if HAS_BRANCH_BIAS:
                added += tl.load(branch_bias + channels, mask=inside, other=0).to(tl.float32)
            stream += tl.load(scale + channels, mask=inside, other=0).to(tl.float32) * added
            rounded = stream.to(y.dtype.element_ty)
            tl.store(y + channels, rounded, mask=inside)
            stream = rounded.to(tl.float32)
        mean = tl.sum(stream, axis=0) / C
        centred = tl.where(inside, stream - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / C
        out = centred * tl.rsqrt(variance + eps) * tl.load(weight + channels, mask=inside, other=0).to(tl.float32)
        out += tl.load(bias + channels, mask=inside, other=0).to(tl.float32)
        tl.store(normed + channels, out.to(normed.dtype.element_ty), mask=inside)
