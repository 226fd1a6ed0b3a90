"""The head's input: LayerNorm of every sequence's hidden vector, guidance mixed in, in one launch.

S slots, R slots computed (the first R), C model dim.

    normed[r] = LN(x[r])                                  where guidance[r] is 1
              = null + guidance[r] * (LN(x[r]) - null)    elsewhere, null = LN(x[unconditional[r]])

The head is linear and the two weights sum to 1, so guiding its input guides its logits, at one head row a sequence
instead of two. As separate operations it is a gather, two norms, three elementwise launches and a scatter, each longer
than its work on rows of 2 KiB. One program a row, its sums in registers and of one shape, float32 inside and rounded
once: a row has the same bits in any batch.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when the kernel is called
    triton = None

_DIM_MAX = 16384  # two rows stay in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def guided_norm(
    x: Tensor, unconditional: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """As `kernels.reference_slots.guided_norm`.

    Args:
        x: (S, C) float32, float16 or bfloat16; C at most 16,384. Rows may be strided, columns not.
        unconditional: (R,) int64, R at most S: the row of x that read the empty caption. Not checked; read only where
            guidance is not 1, and taken as R - 1 where it is more.
        guidance: (R,) float32.
        weight, bias: (C,) of the norm, x's dtype.
        eps: added to the variance.

    Returns:
        (R, C) in x's dtype, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that needs a gradient.
        ImportError: triton is not installed.
    """
    _check(x, unconditional, guidance, weight, bias)
    R, C = unconditional.shape[0], x.shape[1]
    normed = torch.empty(R, C, dtype=x.dtype, device=x.device)
    if R == 0:
        return normed
    block = triton.next_power_of_2(C)
    with torch.cuda.device_of(x):
        _guided_norm_kernel[(R,)](
            normed, x, unconditional, guidance, weight, bias, R, x.stride(0), eps,
            C=C, BLOCK=block, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return normed


def _check(x: Tensor, unconditional: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in _DTYPES or not 0 < x.shape[1] <= _DIM_MAX or x.stride(1) != 1:
        raise ValueError(
            f"x: {words(x)}; must be (S, C) float32, float16 or bfloat16, C at most {_DIM_MAX}, columns contiguous"
        )
    S, C = x.shape
    if (
        unconditional.dim() != 1
        or unconditional.shape[0] > S
        or unconditional.dtype != torch.int64
        or not unconditional.is_contiguous()
    ):
        raise ValueError(f"unconditional: {words(unconditional)}; must be (R,) int64 with R at most {S}, contiguous")
    if guidance.shape != unconditional.shape or guidance.dtype != torch.float32 or not guidance.is_contiguous():
        raise ValueError(f"guidance: {words(guidance)}; must be ({unconditional.shape[0]},) float32, contiguous")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != (C,) or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {words(tensor)}; must be ({C},) {x.dtype}, contiguous")
    check_beside("x", x, {"unconditional": unconditional, "guidance": guidance, "weight": weight, "bias": bias})
    check_no_gradient({"x": x, "weight": weight, "bias": bias})
    check_runs(
        "kernels.guided_norm", "x", x, triton and _guided_norm_kernel, reference="kernels.reference_slots.guided_norm"
    )


if triton is not None:
    # The number of rows is not a constant of the compiled kernel: 1, 16 and 17 rows run the same one.
    @triton.jit(do_not_specialize=["num_rows"])
    def _guided_norm_kernel(  # type: ignore[no-untyped-def]
        normed,
        x,
        unconditional,
        guidance,
        weight,
        bias,
        num_rows,
        row_stride,
        eps,
        C: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK)
        inside = channels < C
        w = tl.load(weight + channels, mask=inside, other=0).to(tl.float32)
        b = tl.load(bias + channels, mask=inside, other=0).to(tl.float32)
        scale = tl.load(guidance + row)
        mixed = _norm_row(x + row * row_stride, w, b, eps, channels, inside, C)  # (BLOCK,)
        if scale != 1:
            # A free slot may name a row beyond those of this launch.
            null_row = tl.minimum(tl.load(unconditional + row), num_rows - 1)
            null = _norm_row(x + null_row * row_stride, w, b, eps, channels, inside, C)
            mixed = null + scale * (mixed - null)
        tl.store(normed + row * C + channels, mixed.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_row(x, w, b, eps, channels, inside, C: tl.constexpr):  # type: ignore[no-untyped-def]
        values = tl.load(x + channels, mask=inside, other=0).to(tl.float32)
        centred = tl.where(inside, values - tl.sum(values, axis=0) / C, 0)
        variance = tl.sum(centred * centred, axis=0) / C
        return centred / tl.sqrt(variance + eps) * w + b
