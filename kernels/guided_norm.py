"""The head's input: LayerNorm of every row's hidden vector, guidance mixed in, in one launch.

S slots, R rows that are computed (the first R slots), C model dim.

    normed[r] = LN(x[r])                                  where guidance[r] is 1
              = null + guidance[r] * (LN(x[r]) - null)    elsewhere, null = LN(x[partner[r]])

The head is linear and the two weights sum to 1, so guiding its input guides its logits, at one head row a drawing
instead of two. Apart it is a gather, two norms, three elementwise launches and a scatter, each longer than its work
on rows of 2 KiB. One program a row, its sums in registers and of one shape, float32 inside and rounded once: a row has
the same bits beside any others.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # said when the kernel is called
    triton = None

_DIM_MAX = 16384  # two rows stay in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def guided_norm(x: Tensor, partner: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As `kernels.reference_slots.guided_norm`.

    Args:
        x: (S, C) float32, float16 or bfloat16; C at most 16,384. Rows may be strided, channels not.
        partner: (R,) int64, R at most S: the row of x that read the empty caption. On the device and not checked; read
            only where guidance is not 1, and taken as R - 1 where it is more.
        guidance: (R,) float32.
        weight, bias: (C,) of the norm, x's dtype.
        eps: added to the variance.

    Returns:
        (R, C) in x's dtype, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that wants a gradient.
        ImportError: triton is not installed.
    """
    _check(x, partner, guidance, weight, bias)
    R, C = partner.shape[0], x.shape[1]
    normed = torch.empty(R, C, dtype=x.dtype, device=x.device)
    if R == 0:
        return normed
    block = triton.next_power_of_2(C)
    with torch.cuda.device_of(x):
        _guided_norm_kernel[(R,)](
            normed, x, partner, guidance, weight, bias, R, x.stride(0), eps,
            C=C, BLOCK=block, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return normed


def _check(x: Tensor, partner: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in _DTYPES or not 0 < x.shape[1] <= _DIM_MAX or x.stride(1) != 1:
        raise ValueError(
            f"x: {words(x)}; must be (S, C) float32, float16 or bfloat16, C at most {_DIM_MAX}, channels together"
        )
    S, C = x.shape
    if partner.dim() != 1 or partner.shape[0] > S or partner.dtype != torch.int64 or not partner.is_contiguous():
        raise ValueError(f"partner: {words(partner)}; must be (R,) int64 with R at most {S}, contiguous")
    if guidance.shape != partner.shape or guidance.dtype != torch.float32 or not guidance.is_contiguous():
        raise ValueError(f"guidance: {words(guidance)}; must be ({partner.shape[0]},) float32, contiguous")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != (C,) or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {words(tensor)}; must be ({C},) {x.dtype}, contiguous")
    check_beside("x", x, {"partner": partner, "guidance": guidance, "weight": weight, "bias": bias})
    check_no_gradient({"x": x, "weight": weight, "bias": bias})
    check_runs(
        "kernels.guided_norm", "x", x, triton and _guided_norm_kernel, reference="kernels.reference_slots.guided_norm"
    )


if triton is not None:
    # The number of rows is no constant of a compiled kernel: 1, 16 and 17 rows run the same one.
    @triton.jit(do_not_specialize=["num_rows"])
    def _guided_norm_kernel(  # type: ignore[no-untyped-def]
        normed, x, partner, guidance, weight, bias, num_rows, row_stride, eps, C: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK)
        inside = channels < C
        w = tl.load(weight + channels, mask=inside, other=0).to(tl.float32)
        b = tl.load(bias + channels, mask=inside, other=0).to(tl.float32)
        scale = tl.load(guidance + row)
        mixed = _norm_row(x + row * row_stride, w, b, eps, channels, inside, C)  # (BLOCK,)
        if scale != 1:
            # A slot that nobody has may name a partner beyond the rows of this launch.
            null_row = tl.minimum(tl.load(partner + row), num_rows - 1)
            null = _norm_row(x + null_row * row_stride, w, b, eps, channels, inside, C)
            mixed = null + scale * (mixed - null)
        tl.store(normed + row * C + channels, mixed.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_row(x, w, b, eps, channels, inside, C: tl.constexpr):  # type: ignore[no-untyped-def]
        values = tl.load(x + channels, mask=inside, other=0).to(tl.float32)
        centred = tl.where(inside, values - tl.sum(values, axis=0) / C, 0)
        variance = tl.sum(centred * centred, axis=0) / C
        return centred / tl.sqrt(variance + eps) * w + b
