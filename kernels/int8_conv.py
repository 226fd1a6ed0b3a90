"""3x3 convolutions of one image in eight bits, for CPUs that multiply bytes (VNNI, AMX).

    out = x_scale * w_scale[k] * sum (q_x - zero_point) q_w + bias

Weights are signed and symmetric, one scale an output channel, activations unsigned with a zero point: the pair that the
instruction takes. oneDNN runs it at 420 to 630 GFLOP/s on two cores where float32 has 150 to 165 (signed activations
fall back to something far slower). Without VNNI oneDNN's sums of two products saturate, and the result is wrong:
callers must check first (engine.device). The zero point's share is a constant of each output channel and goes into the
bias, so that the convolution itself has none; the image's border is filled with the zero point for that.

H x W pixels, C channels in, K out.
Sources: Jacob et al. 2018, arXiv:1712.05877 (affine quantisation); oneDNN through `torch.ops.onednn`, as Inductor calls it.
"""

import torch
from torch import Tensor

_LEVELS = 255  # steps of an unsigned byte
_LARGEST_WEIGHT = 127


class Int8Conv:
    """A 3x3 convolution, stride 1, zero padding 1, of bytes.

    Args:
        weight: (K, C, 3, 3), floating point.
        bias: (K,).
    """

    scale = 1  # of the image

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        weight = weight.detach().float()
        largest = weight.abs().amax((1, 2, 3))  # (K,)
        self._scales = torch.where(largest > 0, largest, torch.ones_like(largest)) / _LARGEST_WEIGHT
        rounded = torch.round(weight / self._scales[:, None, None, None])
        self._sums = self._scales * rounded.sum((1, 2, 3))  # (K,): share of one step of the zero point
        self._bias = bias.detach().float().clone()
        self._no_offsets = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        self.channels_in, self.channels_out = weight.shape[1], weight.shape[0]
        shape = [1, self.channels_in, 18, 66]  # a hint: other sizes run with the same packing
        self._packed = torch.ops.onednn.qconv_prepack(
            rounded.to(torch.int8), self._scales, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, shape
        )

    def __call__(self, padded: Tensor, out: Tensor, *, x_scale: float, zero_point: int, add: bool) -> None:
        """Convolves rows of one image.

        Args:
            padded: (H + 2, W + 2, C) uint8, contiguous: H rows with a neighbour row above and below and a column left
                and right, `zero_point` where the image ends.
            out: (H, W, K) float32, contiguous; written.
            add: onto what `out` holds.
        """
        bias = self._bias - (x_scale * zero_point) * self._sums
        pixels, target = _nchw(padded), _nchw(out)
        layout = ([1, 1], [0, 0], [1, 1], 1, 1.0, 0, torch.float32)  # stride, padding, dilation, groups, output
        weight = (self._packed, self._scales, self._no_offsets)
        if add:
            torch.ops.onednn.qconv2d_pointwise.binary(
                pixels, x_scale, 0, *weight, target, bias, *layout, 1.0, 0, "sum", 1.0, "none", [], ""
            )
        else:
            made = torch.ops.onednn.qconv_pointwise(pixels, x_scale, 0, *weight, bias, *layout, "none", [], "")
            target.copy_(made)


def byte_scale(lowest: float, highest: float) -> tuple[float, int]:
    """The scale and zero point with which 0..255 spans a range; 0 is always in it."""
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    scale = max(highest - lowest, 1e-12) / _LEVELS
    return scale, round(-lowest / scale)


def quantise(values: Tensor, out: Tensor, *, x_scale: float, zero_point: int) -> None:
    """round(values / x_scale) + zero_point, cut to 0..255: (...) float32 -> out (...) uint8."""
    rounded = torch.quantize_per_tensor(values, x_scale, zero_point, torch.quint8)
    # `int_repr` copies element by element, four times slower than the rounding; the bytes are there already.
    stored = torch.empty(0, dtype=torch.uint8, device=values.device).set_(
        rounded.untyped_storage(), 0, rounded.shape, rounded.stride()
    )
    out.copy_(stored)


def _nchw(rows: Tensor) -> Tensor:
    """(H, W, C) contiguous -> (1, C, H, W), channels last, the same memory."""
    return rows.permute(2, 0, 1)[None]
