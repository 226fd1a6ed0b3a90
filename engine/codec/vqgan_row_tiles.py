"""One convolution of one image on a CPU, tile by tile of rows, with the operations before and after it.

    source rows -> scale * x + shift -> SiLU -> 3x3 convolution -> target rows (+=) -> sums by channel
     (H, W, C)      the normalisation            kernels.*         (H, W, K)          the next normalisation

Where the package was built with a C++ compiler, one call of compiled code does all of it (kernels.convolution), block by block.
Without, torch's operators do, on tiles of rows.

Rows stay in the cache from the first arrow to the last. Separately, each arrow reads and writes 33 MB for 128 channels of
256 x 256 pixels (GroupNorm and SiLU of one such map then take longer than its convolution: 300 and 200 ms on one core).

The tiles of a map, and the order in which their sums are added, are the same for any number of threads.

H x W pixels, C channels in, K out.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.convolution import CompiledConv
from kernels.winograd import TILE, Scratch, WinogradConv

_WINOGRAD_TILES = 64  # in a row tile; fewer read the weights too often, more leave the cache
_TILE_PIXELS = 4096  # of a row tile without Winograd


class ThreadPool:
    """The threads that work on one image, and the buffers of each.

    Args:
        local: where each thread keeps its buffers from image to image.
        pool, threads: None and 1: the calling thread only.
    """

    def __init__(self, local: threading.local, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        self._local, self._pool, self._threads = local, pool, threads

    def split(self, count: int, work: Callable[[int, int], None]) -> None:
        """Calls work(first, last) on parts of range(count), one part a thread, and waits for all."""
        if self._pool is None:
            work(0, count)
            return
        parts = min(self._threads, count)
        ends = [count * part // parts for part in range(parts + 1)]
        list(self._pool.map(torch.no_grad()(work), ends[:-1], ends[1:]))

    def buffer(self, name: str, *shape: int) -> Tensor:
        """The calling thread's float32 buffer of that name on the CPU, contents undefined; valid until the name is used again."""
        held: dict[str, Tensor] = self._local.__dict__.setdefault("held", {})
        size = 1
        for length in shape:
            size *= length
        found = held.get(name)
        if found is None or len(found) < size:
            found = held[name] = torch.empty(size, dtype=torch.float32, device="cpu")
        return found[:size].view(shape)


# ------------------------------------------------------------------------------------------------------ normalisation


class Moments(NamedTuple):
    """Statistics of a feature map by channel, for the GroupNorm after it; (C,) float64 each."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Of a whole map (H, W, C)."""
        parts = torch.empty(1, 2, values.shape[2], dtype=torch.float32, device="cpu")
        _measure(values, parts[0])
        return cls.merged(parts)

    @classmethod
    def merged(cls, parts: Tensor) -> "Moments":
        """Of (tiles, 2, C) as `_measure` writes them, of equally many pixels each."""
        return cls(*_merged(parts[:, 0].double(), parts[:, 1].double(), dim=0))

    @classmethod
    def of_blocks(cls, parts: Tensor, counts: Tensor) -> "Moments":
        """Of (blocks, 4, C) of `counts` (blocks,) pixels, as `CompiledConv` writes them."""
        shares = (counts.double() / counts.double().sum())[:, None]
        means = parts[:, 0].double()
        mean = (shares * means).sum(0)
        variance = (shares * (parts[:, 1].double() + (means - mean).square())).sum(0)
        return cls(mean, variance)


def _merged(means: Tensor, variances: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Pooled mean and variance of parts of equal size (Chan et al.)."""
    mean = means.mean(dim, keepdim=True)
    return mean.squeeze(dim), (variances + (means - mean).square()).mean(dim)


def _measure(values: Tensor, part: Tensor) -> None:
    """(H, W, C) contiguous -> part (2, C): mean and variance."""
    # Half the time of torch.sum and the sum of squares, with the variance around the mean: 0.19 and 0.38 ms for 4096
    # pixels of 128 channels (torch.var_mean: 4 ms).
    part[0], part[1] = torch.batch_norm_update_stats(values.permute(2, 0, 1)[None], None, None, 0.0)


class GroupNormAffine:
    """GroupNorm as a scale and a shift a channel."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self._weight, self._bias = norm.weight.detach().double(), norm.bias.detach().double()
        self._groups, self._eps = norm.num_groups, norm.eps

    def affine(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """(C,) scale and (C,) shift, float32: scale * x + shift is the normalised x."""
        by_group = (values.view(self._groups, -1) for values in (moments.mean, moments.variance))
        mean, variance = _merged(*by_group, dim=1)  # (groups,)
        scale = self._weight.view(self._groups, -1) / (variance + self._eps).sqrt()[:, None]  # (groups, C / groups)
        shift = self._bias.view(self._groups, -1) - mean[:, None] * scale
        return scale.flatten().float(), shift.flatten().float()


class Activation(NamedTuple):
    """SiLU(scale * x + shift), (C,) each."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def after(cls, norm: GroupNormAffine, moments: Moments) -> "Activation":
        return cls(*norm.affine(moments))

    def __call__(self, rows: Tensor, out: Tensor) -> None:
        F.silu(torch.addcmul(self.shift, rows, self.scale, out=out), inplace=True)


# ------------------------------------------------------------------------------------------------------- convolutions


class FloatConv(Protocol):
    """A 3x3 convolution of rows padded with their neighbours: see `WinogradConv`."""

    scale: int
    channels_out: int

    def __call__(self, padded: Tensor, out: Tensor, *, add: bool, scratch: Scratch) -> None: ...


def float_conv(
    conv: nn.Conv2d, size: tuple[int, int], library: ctypes.CDLL | None, *, doubled: bool = False
) -> FloatConv | CompiledConv:
    """A compiled one; without `library` the fastest of torch's operators for maps of `size`, height and width (before doubling)."""
    if library is not None:
        return CompiledConv(library, conv.weight, bias_of(conv), doubled=doubled)
    if conv.out_channels * 9 <= conv.in_channels:
        return NarrowConv(conv)
    if WinogradConv.fits(*size, doubled=doubled):
        return WinogradConv(conv.weight, bias_of(conv), doubled=doubled)
    return DirectConv(conv, doubled=doubled)


class DirectConv:
    """A 3x3 convolution by torch, for maps that are not whole tiles."""

    def __init__(self, conv: nn.Conv2d, *, doubled: bool) -> None:
        self._weight = conv.weight.detach().float().contiguous(memory_format=torch.channels_last)
        self._bias = bias_of(conv)
        self.scale, self.channels_out = 2 if doubled else 1, conv.out_channels

    def __call__(self, padded: Tensor, out: Tensor, *, add: bool, scratch: Scratch) -> None:
        if self.scale == 2:  # each neighbour row and column has become two, of which the outer is not read
            padded = padded.repeat_interleave(2, 0).repeat_interleave(2, 1)[1:-1, 1:-1]
        made = F.conv2d(padded.permute(2, 0, 1)[None], self._weight, self._bias)[0].permute(1, 2, 0)  # (H, W, K)
        if add:
            out.add_(made)
        else:
            out.copy_(made)


class NarrowConv:
    """A 3x3 convolution to few channels: one product with the nine taps side by side, then nine shifted sums.

    oneDNN computes 16 channels for 3: 2.5 ms for 16 rows of 256 pixels and 128 channels; the product takes 0.6.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._weight = conv.weight.detach().float().permute(1, 2, 3, 0).flatten(1).contiguous()  # (C, 9 K)
        self._bias = bias_of(conv)
        self.scale, self.channels_out = 1, conv.out_channels

    def __call__(self, padded: Tensor, out: Tensor, *, add: bool, scratch: Scratch) -> None:
        H, W, K = out.shape
        taps = scratch("tiles", *padded.shape[:2], 9 * K)
        torch.mm(padded.view(-1, padded.shape[2]), self._weight, out=taps.view(-1, 9 * K))
        if add:
            out.add_(self._bias)
        else:
            out.copy_(self._bias.expand_as(out))
        for tap in range(9):
            down, right = divmod(tap, 3)
            out.add_(taps[down : down + H, right : right + W, tap * K : (tap + 1) * K])


def bias_of(conv: nn.Conv2d) -> Tensor:
    """(K,) float32, a copy."""
    assert conv.bias is not None, "taming's convolutions have one"
    return conv.bias.detach().float().clone()


def convolve(
    conv: FloatConv | CompiledConv,
    source: Tensor,
    target: Tensor,
    threads: ThreadPool,
    *,
    activation: Activation | None = None,
    add: bool = False,
    measured: bool = True,
) -> Moments | None:
    """target = conv(activation(source)), or += with `add`.

    Args:
        source: (H, W, C) float32, contiguous.
        target: (conv.scale * H, conv.scale * W, K) float32, contiguous; written.
        activation: None: the source as it is.
        measured: whether to compute the target's moments.

    Returns:
        The target's moments, None without `measured`.
    """
    if isinstance(conv, CompiledConv):
        return _convolve_compiled(conv, source, target, threads, activation, add=add, measured=measured)
    H, W, C = source.shape
    rows = _tile_rows(conv, H, W)
    steps, out_rows = H // rows, rows * conv.scale
    parts = torch.empty(steps, 2, target.shape[2], dtype=torch.float32, device="cpu")

    def convolve_tiles(first: int, last: int) -> None:
        padded = threads.buffer("padded", rows + 2, W + 2, C)
        padded[:, 0] = 0
        padded[:, -1] = 0
        for step in range(first, last):
            top = step * rows  # padded[0] is row top - 1
            ready = 0
            if step == 0:
                padded[0] = 0
                ready = 1
            elif step > first and rows >= 2:
                padded[:2] = padded[rows:]
                ready = 2
            end = min(rows + 2, H + 1 - top)
            fresh, place = source[top - 1 + ready : top - 1 + end], padded[ready:end, 1:-1]
            if activation is None:
                place.copy_(fresh)
            else:
                activation(fresh, place)
            padded[end:] = 0
            part = target[step * out_rows : (step + 1) * out_rows]
            conv(padded, part, add=add, scratch=threads.buffer)
            if measured:
                _measure(part, parts[step])

    threads.split(steps, convolve_tiles)
    return Moments.merged(parts) if measured else None


def _convolve_compiled(
    conv: CompiledConv,
    source: Tensor,
    target: Tensor,
    threads: ThreadPool,
    activation: Activation | None,
    *,
    add: bool,
    measured: bool,
) -> Moments | None:
    blocks = conv.num_blocks(*source.shape[:2])
    moments = counts = None
    if measured:
        moments = torch.empty(blocks, 4, conv.padded_channels, dtype=torch.float32, device="cpu")
        counts = torch.empty(blocks, dtype=torch.float32, device="cpu")

    def convolve_blocks(first: int, last: int) -> None:
        conv(source, target, first, last, activation=activation, add=add, moments=moments, counts=counts)

    threads.split(blocks, convolve_blocks)
    if moments is None or counts is None:
        return None
    return Moments.of_blocks(moments[:, :, : conv.channels_out], counts)


def _tile_rows(conv: FloatConv, height: int, width: int) -> int:
    """Source rows of a row tile: a divisor of the height, whole Winograd tiles where the convolution has tiles."""
    if isinstance(conv, WinogradConv):
        tile = TILE // conv.scale
        return tile * _divisor(height // tile, _WINOGRAD_TILES * tile // width)
    return _divisor(height, _TILE_PIXELS // width)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return next((size for size in range(min(number, max(most, 1)), 1, -1) if number % size == 0), 1)
