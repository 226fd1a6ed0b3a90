"""The VQGAN decoder on a CPU, in float32: an image is decoded in tiles of rows.

Three things make it faster than the modules, each of which leaves the cache and waits for all threads:

- A tile of rows passes normalisation, SiLU, convolution and the next normalisation's sums while it is in the cache
  (engine.codec.vqgan_row_tiles).
- 3x3 convolutions are Winograd's, with a quarter of the products (kernels.convolution, compiled; kernels.winograd, by torch's operators).
- No operation is split among threads: each thread has an image, or row tiles of one (engine.codec.threads).

An image's pixels depend on its tokens alone: not on the rest of the batch, nor on the number of threads, since the steps
are the same and every operation runs on one thread.

H x W pixels, C channels in, K out, Z latent channels, S the image's pixels on a side.
Source of the network: CompVis/taming-transformers `Decoder`.
"""

import ctypes
import math
import threading
from collections.abc import Callable

import torch
from taming.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock
from torch import Tensor, nn

from engine.codec.threads import single_threads
from engine.codec.vqgan_row_tiles import (
    Activation,
    FloatConv,
    GroupNormAffine,
    Moments,
    ThreadPool,
    bias_of,
    convolve,
    float_conv,
)
from kernels.convolution import LANES, CompiledConv
from kernels.winograd import WinogradConv


class CpuDecoder:
    """taming's decoder with repacked weights; it shares no memory with the module.

    The weights take 609 MB for the published decoder: Winograd's are four times the size of the module's.

    Args:
        decoder: taming's, on the CPU.
        grid: rows and columns of the latents that it is made for, beside others that `fits` admits; None: the module's own.
        library: compiled convolutions (`convolution_library`), for decoders that they `fit`; None: torch's operators.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        grid: tuple[int, int] | None = None,
        library: ctypes.CDLL | None = None,
    ) -> None:
        size = self._grid = grid or (decoder.z_shape[2], decoder.z_shape[3])
        self._library = library
        self._first = float_conv(decoder.conv_in, size, library)
        self._steps: list[_Block | _Attention | FloatConv | CompiledConv] = [
            _Block(decoder.mid.block_1, size, library),
            _Attention(decoder.mid.attn_1),
            _Block(decoder.mid.block_2, size, library),
        ]
        for level in reversed(decoder.up):
            for number, block in enumerate(level.block):
                self._steps.append(_Block(block, size, library))
                if len(level.attn):
                    self._steps.append(_Attention(level.attn[number]))
            if hasattr(level, "upsample"):
                self._steps.append(float_conv(level.upsample.conv, size, library, doubled=True))
                size = (2 * size[0], 2 * size[1])
        self._image_size = size
        self._last_norm = GroupNormAffine(decoder.norm_out)
        self._last = float_conv(decoder.conv_out, size, library)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether it decodes latents of these rows and columns: whole tiles where its own must be whole tiles."""
        if self._library is not None:
            return True
        levels = [2**level for level in range((self._image_size[0] // self._grid[0]).bit_length())]
        is_tiled = [WinogradConv.fits(self._grid[0] * scale, self._grid[1] * scale) for scale in levels]
        needed = [WinogradConv.fits(rows * scale, columns * scale) for scale in levels]
        # A doubling has tiles of half the size, which are whole where those after it are.
        return all(is_whole or not was for was, is_whole in zip(is_tiled, needed, strict=True))

    @torch.no_grad()
    def decode(self, latents: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """`count` images, each (S, S, 3) float32 around [-1, 1].

        Args:
            latents: of image i, (h, w, Z) float32; called by the thread that decodes it.
        """
        local = threading.local()

        @torch.no_grad()
        def on_one_thread(number: int) -> Tensor:
            return self._decode_image(latents(number), ThreadPool(local))

        # Inference mode is a thread's own, and its tensors may not be written outside it.
        with torch.inference_mode(False), single_threads() as (pool, threads):
            whole = count - count % threads
            images = list(pool.map(on_one_thread, range(whole)))
            # The remaining images are decoded in turn, each by all threads.
            shared = ThreadPool(local, pool, threads)
            images += [self._decode_image(latents(number), shared) for number in range(whole, count)]
        return images

    def _decode_image(self, latents: Tensor, threads: ThreadPool) -> Tensor:
        stream = threads.buffer("stream 0", *latents.shape[:2], self._first.channels_out)
        moments = convolve(self._first, latents, stream, threads)
        for number, step in enumerate(self._steps, start=1):
            if isinstance(step, _Block | _Attention):
                assert moments is not None
                stream, moments = step(stream, moments, threads, name=f"stream {number}")
                continue
            H, W, _ = stream.shape
            larger = threads.buffer(f"stream {number}", 2 * H, 2 * W, step.channels_out)
            moments = convolve(step, stream, larger, threads)
            stream = larger
        assert moments is not None
        image = torch.empty(*stream.shape[:2], self._last.channels_out, dtype=torch.float32, device="cpu")
        activation = Activation.after(self._last_norm, moments)
        convolve(self._last, stream, image, threads, activation=activation, measured=False)
        return image


def fits_compiled(decoder: Decoder) -> bool:
    """Whether every 3x3 convolution of it can be a compiled one."""
    convs = [module for module in decoder.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    return all(conv.in_channels % LANES == 0 for conv in convs)


class _Block:
    """Residual block: stream + conv2(silu(norm2(conv1(silu(norm1(stream)))))), a 1x1 convolution where C changes."""

    def __init__(self, block: ResnetBlock, size: tuple[int, int], library: ctypes.CDLL | None) -> None:
        self._norm1, self._norm2 = GroupNormAffine(block.norm1), GroupNormAffine(block.norm2)
        self._conv1, self._conv2 = (float_conv(conv, size, library) for conv in (block.conv1, block.conv2))
        self._shortcut = _Linear(block.nin_shortcut) if block.in_channels != block.out_channels else None

    def __call__(self, stream: Tensor, moments: Moments, threads: ThreadPool, *, name: str) -> tuple[Tensor, Moments]:
        """Adds to the stream (H, W, C) in place, or to a new one called `name`; also its moments."""
        H, W, _ = stream.shape
        K = self._conv1.channels_out
        branch = threads.buffer("branch", H, W, K)
        between = self._convolve(self._conv1, self._norm1, stream, moments, branch, threads)
        if self._shortcut is not None:
            stream = self._shortcut(stream, out=threads.buffer(name, H, W, K))
        return stream, self._convolve(self._conv2, self._norm2, branch, between, stream, threads, add=True)

    @staticmethod
    def _convolve(
        conv: FloatConv | CompiledConv,
        norm: GroupNormAffine,
        source: Tensor,
        moments: Moments,
        target: Tensor,
        threads: ThreadPool,
        *,
        add: bool = False,
    ) -> Moments:
        activation = Activation.after(norm, moments)
        after = convolve(conv, source, target, threads, activation=activation, add=add)
        assert after is not None
        return after


class _Attention:
    """stream + proj(softmax(q k^T / sqrt(C)) v), one head over all pixels: at 16 x 16 pixels 1 % of the work."""

    def __init__(self, block: AttnBlock) -> None:
        self._norm = GroupNormAffine(block.norm)
        convs = (block.q, block.k, block.v)
        self._weight = torch.cat([_matrix(conv) for conv in convs], dim=1)  # (C, 3 C)
        self._bias = torch.cat([bias_of(conv) for conv in convs])
        self._project = _Linear(block.proj_out)

    def __call__(self, stream: Tensor, moments: Moments, threads: ThreadPool, *, name: str) -> tuple[Tensor, Moments]:
        C = stream.shape[2]
        rows = stream.view(-1, C)  # (H W, C)
        scale, shift = self._norm.affine(moments)
        q, k, v = torch.addmm(self._bias, torch.addcmul(shift, rows, scale), self._weight).split(C, dim=1)
        seen = torch.softmax((q @ k.T) / math.sqrt(C), dim=1) @ v
        rows.add_(self._project(seen, out=threads.buffer("branch", *rows.shape)))
        return stream, Moments.of(stream)


class _Linear:
    """A 1x1 convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._weight, self._bias = _matrix(conv), bias_of(conv)

    def __call__(self, values: Tensor, *, out: Tensor) -> Tensor:
        """(..., C) -> out (..., K), both contiguous."""
        C, K = self._weight.shape
        torch.addmm(self._bias, values.view(-1, C), self._weight, out=out.view(-1, K))
        return out


def _matrix(conv: nn.Conv2d) -> Tensor:
    """(C, K) of a 1x1 convolution, float32, a copy."""
    return conv.weight.detach().float()[:, :, 0, 0].T.contiguous()
