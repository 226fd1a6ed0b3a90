"""value * gelu(gate) of the feed-forward branch, with the bias of its first linear layer, in one pass.

R rows (all leading dimensions), F feed-forward inner dim.

    x  [ value: 0 .. F-1 | gate: F .. 2F-1 ]  ->  (value + bias_value) * gelu(gate + bias_gate)

Elementwise, so nothing about it can depend on how many rows there are. In plain PyTorch it is two launches and a
16-bit rounding between them (three and two with the bias); here it is one and none: float32 inside, exact (erf) GELU.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs, words

try:
    import triton
    import triton.language as tl
except ImportError:  # said when the kernel is called
    triton = None

_BLOCK = 1024  # outputs a program: 8 a thread, 16 bytes of 16-bit numbers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """value * gelu(gate), as `kernels.reference.geglu` of x + bias.

    Args:
        x: (..., 2F) float32, float16 or bfloat16, value first, then gate. Rows may be strided, channels not.
        bias: (2F,) of x's dtype, which the linear layer before left out.

    Returns:
        (..., F) in x's dtype, contiguous.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that wants a gradient.
        ImportError: triton is not installed.
    """
    _check(x, bias)
    inner = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * inner)  # (R, 2F): a view where the strides allow it
    out = torch.empty(*x.shape[:-1], inner, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    block = min(_BLOCK, triton.next_power_of_2(inner))
    with torch.cuda.device_of(x):
        _geglu_kernel[(rows.shape[0], triton.cdiv(inner, block))](
            out, rows, rows if bias is None else bias, rows.stride(0),
            F=inner, BLOCK=block, HAS_BIAS=bias is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(x: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.dtype not in _DTYPES or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"x: {words(x)}; must be (..., 2F) float32, float16 or bfloat16")
    if x.stride(-1) != 1:
        raise ValueError(f"x: {words(x)}; channels must lie together in memory: make it contiguous")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias: {words(bias)}; must be ({x.shape[-1]},) {x.dtype}, contiguous")
    check_beside("x", x, {"bias": bias})
    check_no_gradient({"x": x, "bias": bias})
    check_runs("kernels.geglu", "x", x, triton and _geglu_kernel, reference="kernels.reference.geglu")


if triton is not None:

    @triton.jit
    def _geglu_kernel(  # type: ignore[no-untyped-def]
        out, x, bias, row_stride, F: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = channels < F
        x += row * row_stride
        value = tl.load(x + channels, mask=inside, other=0).to(tl.float32)  # (BLOCK,)
        gate = tl.load(x + F + channels, mask=inside, other=0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + channels, mask=inside, other=0).to(tl.float32)
            gate += tl.load(bias + F + channels, mask=inside, other=0).to(tl.float32)
        gelu = gate * 0.5 * (1.0 + tl.erf(gate * 0.70710678118654752))
        tl.store(out + row * F + channels, (value * gelu).to(out.dtype.element_ty), mask=inside)
