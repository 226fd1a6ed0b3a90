"""GroupNorm of channels-last images, with or without SiLU after it.

B images, P pixels, C channels, G groups.

    y = (x - mean) / sqrt(var + eps) * weight + bias        out = y * sigmoid(y)

torch's GroupNorm takes channels first and would copy the map there and back. With a separate SiLU, a decoder's map of 256 x
256 pixels and 128 channels is read and written five times, here it is read twice and written once. Three launches:

    moments   a block of pixels   mean and squared distances of each channel
    affine    an image            the blocks together, by group: a scale and a shift for each channel
    apply     a block of pixels   SiLU(scale * x + shift)

Everything is float32 inside. The size of a block does not depend on B, and blocks are added in one order: an image has
the same bits in any batch.
"""

import torch
from torch import Tensor

from kernels.contract import check_beside, check_no_gradient, check_runs

try:
    import triton
    import triton.language as tl
except ImportError:  # reported when the kernel is called
    triton = None

_CHANNELS_MAX = 4096
_BLOCK_ELEMENTS = 8192  # of a program: 64 pixels of 128 channels, 32 values a thread of 8 warps
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, silu: bool) -> Tensor:
    """GroupNorm of channels-last images, as `kernels.reference.group_norm`.

    Args:
        x: (B, P, C) float32, float16 or bfloat16, contiguous; C at most 4096.
        weight, bias: (C,), of x's dtype and device.
        groups: divides C; neighbouring channels make a group.
        eps: added to the variance.
        silu: whether y * sigmoid(y) follows.

    Returns:
        like x.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or one that needs a gradient.
        ImportError: triton is not installed.
    """
    _check(x, weight, bias, groups)
    B, P, C = x.shape
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    block_c = triton.next_power_of_2(C)
    block_p = max(_BLOCK_ELEMENTS // block_c, 1)
    blocks = triton.cdiv(P, block_p)
    parts = torch.empty(B, blocks, 2, C, dtype=torch.float32, device=x.device)
    affine = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _moments_kernel[(blocks, B)](x, parts, P, blocks, C=C, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=8)
        _affine_kernel[(B,)](
            parts, weight, bias, affine, P, blocks, eps,
            C=C, BLOCK_C=block_c, BLOCK_P=block_p, GROUP=C // groups, num_warps=8,
        )  # fmt: skip
        _apply_kernel[(blocks, B)](
            x, affine, out, P, C=C, BLOCK_C=block_c, BLOCK_P=block_p, SILU=silu, num_warps=8
        )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    if x.dim() != 3 or x.dtype not in _DTYPES or not 0 < x.shape[2] <= _CHANNELS_MAX or not x.is_contiguous():
        raise ValueError(
            f"x: {tuple(x.shape)} {x.dtype} of strides {x.stride()}; must be (B, P, C) float32, float16 or bfloat16, "
            f"contiguous, C at most {_CHANNELS_MAX}"
        )
    C = x.shape[2]
    if groups < 1 or C % groups:
        raise ValueError(f"groups: {groups}; must divide {C} channels")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor.shape != (C,) or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; must be ({C},) {x.dtype}, contiguous")
    check_beside("x", x, {"weight": weight, "bias": bias})
    check_no_gradient({"x": x, "weight": weight, "bias": bias})
    check_runs("kernels.group_norm", "x", x, triton and _moments_kernel, reference="kernels.reference.group_norm")


if triton is not None:

    @triton.jit(do_not_specialize=["P", "blocks"])
    def _moments_kernel(  # type: ignore[no-untyped-def]
        x, parts, P, blocks, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
    ):
        block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
        channels = tl.arange(0, BLOCK_C)
        pixels = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixels < P)[:, None] & (channels < C)[None, :]
        places = image * P * C + pixels.to(tl.int64)[:, None] * C + channels[None, :]
        values = tl.load(x + places, mask=inside, other=0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        count = tl.minimum(P - block * BLOCK_P, BLOCK_P)
        mean = tl.sum(values, axis=0) / count
        away = tl.where(inside, values - mean[None, :], 0.0)
        parts += (image * blocks + block) * 2 * C
        tl.store(parts + channels, mean, mask=channels < C)
        tl.store(parts + C + channels, tl.sum(away * away, axis=0), mask=channels < C)

    @triton.jit
    def _over_group(values, scratch, channels, inside, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
        """For each channel the sum over its group. A reshape could do it for powers of two only: `scratch` (C,) is used."""
        tl.debug_barrier()  # all reads of its last contents are done
        tl.store(scratch + channels, values, mask=inside)
        tl.debug_barrier()
        first = scratch + channels // GROUP * GROUP
        total = tl.zeros_like(values)
        for neighbour in range(GROUP):
            total += tl.load(first + neighbour, mask=inside, other=0)
        tl.debug_barrier()
        return total

    @triton.jit(do_not_specialize=["P", "blocks"])
    def _affine_kernel(  # type: ignore[no-untyped-def]
        parts, weight, bias, affine, P, blocks, eps,
        C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        image = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK_C)
        inside = channels < C
        parts += image * blocks * 2 * C
        total = tl.zeros([BLOCK_C], tl.float32)
        # Many blocks at a time: one after the other, each load's latency would be waited for.
        for first in range(0, blocks, BLOCK_P):
            block = first + tl.arange(0, BLOCK_P)
            count = tl.maximum(tl.minimum(P - block * BLOCK_P, BLOCK_P), 0)[:, None]
            places = parts + block[:, None] * (2 * C) + channels[None, :]
            here = (block < blocks)[:, None] & inside[None, :]
            total += tl.sum(count * tl.load(places, mask=here, other=0), axis=0)
        affine += image * 2 * C
        mean = _over_group(total, affine, channels, inside, GROUP) / (P * GROUP)
        squares = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, blocks, BLOCK_P):
            block = first + tl.arange(0, BLOCK_P)
            count = tl.maximum(tl.minimum(P - block * BLOCK_P, BLOCK_P), 0)[:, None]
            places = parts + block[:, None] * (2 * C) + channels[None, :]
            here = (block < blocks)[:, None] & inside[None, :]
            away = tl.load(places, mask=here, other=0) - mean[None, :]
            squares += tl.sum(tl.load(places + C, mask=here, other=0) + count * away * away, axis=0)
        variance = _over_group(squares, affine, channels, inside, GROUP) / (P * GROUP)
        scale = tl.load(weight + channels, mask=inside, other=0).to(tl.float32) * tl.rsqrt(variance + eps)
        shift = tl.load(bias + channels, mask=inside, other=0).to(tl.float32) - mean * scale
        tl.store(affine + channels, scale, mask=inside)
        tl.store(affine + C + channels, shift, mask=inside)

    @triton.jit(do_not_specialize=["P"])
    def _apply_kernel(  # type: ignore[no-untyped-def]
        x, affine, out, P, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr
    ):
        block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
        channels = tl.arange(0, BLOCK_C)
        pixels = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixels < P)[:, None] & (channels < C)[None, :]
        places = image * P * C + pixels.to(tl.int64)[:, None] * C + channels[None, :]
        values = tl.load(x + places, mask=inside, other=0).to(tl.float32)
        scale = tl.load(affine + image * 2 * C + channels, mask=channels < C, other=0)
        shift = tl.load(affine + image * 2 * C + C + channels, mask=channels < C, other=0)
        values = values * scale[None, :] + shift[None, :]
        if SILU:
            values = values / (1.0 + tl.exp(-values))
        tl.store(out + places, values.to(out.dtype.element_ty), mask=inside)
