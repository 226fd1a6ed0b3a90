"""The fast decoder of a codec: the images of `ImageCodec.decode` up to rounding, at the machine's speed.

    VQGANs, CPU, float32                      engine.codec.vqgan_cpu: Winograd's convolutions, compiled or by torch's operators
    CPU, 16 bit or another family             the modules, an image a thread; bfloat16 channels last
    GPU                                       engine.codec.vqgan_cuda: VQGANs channels last; one CUDA graph

The codebook and the 1x1 convolution after it are one table (`latent_table`, 16,384 x 256 as published): a code's latent
vector is looked up.

Where the package was built without a C++ compiler, or a width is no multiple of 16, float32 is computed by torch's operators: wide
decoders in row tiles, narrow ones by the modules. Row tiles cost some thousand small operations: a decoder of 32 channels, whose
maps fit the cache whole, is 2.7 times faster without (48 pixels, eight images on two cores: 191 ms with row tiles, 71 ms without; at 64
channels and 64 pixels 321 and 351 ms). benchmarks/codec_speed.py compares all ways.

Decoding is batch-invariant: an image depends on its tokens alone, bit for bit.

A grid of tokens larger than the trained one, oblong ones too, is decoded as a whole, so that windows of tokens leave no seam in the
pixels: convolutions take any size, and what sees the whole image (normalisation, self-attention) sees all of the larger one.

B images, N image tokens, K codes, E width of an entry, Z latent channels, S pixels.
"""

import copy
import ctypes
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from engine.codec.compiled_convolution import convolution_library
from engine.codec.threads import single_threads
from engine.codec.vqgan_cpu import CpuDecoder, fits_compiled
from engine.config.codec import VqganConfig
from engine.errors import InputError
from engine.models.image_codec import ImageCodec
from engine.models.vqgan import to_unit_range

if TYPE_CHECKING:
    from engine.codec.vqgan_cuda import CudaDecoder

Precision = Literal["float32", "bfloat16", "float16"]
Way = Literal["compiled", "row tiles", "modules"]
WIDE_CHANNELS = 64  # base channels from which row tiles and channels last pay
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FastDecoder:
    """An image decoder with copies of a codec's weights, on the codec's device.

    Args:
        codec: on a CPU or a GPU, of any dtype; not changed. Its decoder is read once more for a grid that is no whole tiles.
        precision: of weights and feature maps.
        way: of VQGANs in float32 on a CPU; None: the fastest. `modules`: an image a thread; `row tiles`: by torch's operators;
            `compiled`: where the package was built with a C++ compiler and the decoder's widths are multiples of 16.

    Raises:
        InputError: unknown precision.
    """

    def __init__(self, codec: ImageCodec, *, precision: Precision = "float32", way: Way | None = None) -> None:
        if precision not in _DTYPES:
            raise InputError("precision", precision, f"write one of {', '.join(_DTYPES)}")
        self.config, self.precision = codec.config, precision
        self._table = codec.latent_table()
        self._device = self._table.device
        self._cpu: CpuDecoder | None = None
        self._larger_cpu: dict[
            tuple[int, int], CpuDecoder
        ] = {}  # for grids that are no whole tiles of the trained one's
        self._cuda: CudaDecoder | None = None
        dtype = _DTYPES[precision]
        if self._device.type == "cuda":
            self._cuda = _cuda_decoder(codec, self._table, dtype)
        elif precision == "float32" and (way or _fastest_way(codec)) != "modules":
            self._library = _library(codec) if way in ("compiled", None) else None
            self._cpu = CpuDecoder(codec.decoder, library=self._library)
            self._source, self._table = codec.decoder, self._table.float()
        else:
            module: nn.Module = copy.deepcopy(codec.decoder).eval().requires_grad_(False)
            keeps_layout = dtype != torch.bfloat16 and _is_narrow(codec)
            self._layout = torch.contiguous_format if keeps_layout else torch.channels_last
            self._module = module.to(dtype=dtype).to(memory_format=self._layout)  # type: ignore[call-overload]
            self._table = self._table.to(dtype)
            self._to_images = codec.to_images

    @torch.no_grad()
    def decode(self, image_tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens to images: (B, N) integers -> (B, 3, S, S) float32 in [0, 1].

        Args:
            grid: rows and columns of tokens; None: the trained grid. N is their product then, and images are as large as they say.

        Raises:
            ValueError: wrong shape or type, or a token outside the codebook.
        """
        rows, columns = grid = grid or (self.config.grid_size, self.config.grid_size)
        image_tokens = self._checked(image_tokens, rows * columns)
        if self._cuda is not None:
            images, done = self._cuda.enqueue(image_tokens, grid=grid)
            done.wait()
            return images
        cell = self.config.image_size // self.config.grid_size
        if len(image_tokens) == 0:
            return torch.empty(0, 3, rows * cell, columns * cell, dtype=torch.float32, device=self._device)
        if self._cpu is not None:
            decoded = self._cpu_decoder(grid).decode(
                lambda number: self._table[image_tokens[number]].view(rows, columns, -1), len(image_tokens)
            )  # (S, S, 3) each
            return to_unit_range(torch.stack(decoded).permute(0, 3, 1, 2)).contiguous()
        latents = self._table[image_tokens].view(-1, rows, columns, self._table.shape[1]).permute(0, 3, 1, 2)
        with single_threads() as (pool, _):
            return torch.cat(list(pool.map(self._decode_image, latents))).contiguous()

    def _cpu_decoder(self, grid: tuple[int, int]) -> CpuDecoder:
        """The decoder of the trained grid, or one that is made for another and kept."""
        assert self._cpu is not None
        if self._cpu.fits(*grid):
            return self._cpu
        if grid not in self._larger_cpu:
            self._larger_cpu = {grid: CpuDecoder(self._source, grid=grid, library=self._library)}
        return self._larger_cpu[grid]

    @torch.inference_mode()
    def _decode_image(self, latent: Tensor) -> Tensor:
        """(Z, h, w) -> (1, 3, S, S), by the modules, on one thread."""
        return self._to_images(self._module(latent[None].contiguous(memory_format=self._layout)))

    def decode_async(self, image_tokens: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """On a GPU: starts decoding and returns images that may be read after the event (`CudaDecoder.enqueue`).

        The tokens' values are not checked, which would wait for the GPU: pass what the sampler returned.

        Raises:
            ValueError: wrong shape, or a decoder on the CPU.
        """
        if self._cuda is None:
            raise ValueError("decode_async: this decoder is on the CPU, call decode")
        self._check_shape(image_tokens, self.config.image_seq_len)
        return self._cuda.enqueue(image_tokens.long())

    def _check_shape(self, image_tokens: Tensor, N: int) -> None:
        if image_tokens.dim() != 2 or image_tokens.shape[1] != N:
            raise ValueError(f"image tokens must be (B, {N}), got {tuple(image_tokens.shape)}")
        if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
            raise ValueError(f"image tokens must be integers, not {image_tokens.dtype}")

    def _checked(self, image_tokens: Tensor, N: int) -> Tensor:
        self._check_shape(image_tokens, N)
        image_tokens = image_tokens.long()
        if image_tokens.numel():
            lowest, highest = (int(value) for value in torch.stack(torch.aminmax(image_tokens)).tolist())
            if lowest < 0 or highest >= self.config.codebook_size:
                last = self.config.codebook_size - 1
                raise ValueError(f"image tokens span {lowest}..{highest}; the codebook has 0..{last}")
        return image_tokens


def _is_narrow(codec: ImageCodec) -> bool:
    return isinstance(codec.config, VqganConfig) and codec.config.base_channels < WIDE_CHANNELS


def _cuda_decoder(codec: ImageCodec, table: Tensor, dtype: torch.dtype) -> "CudaDecoder":
    from engine.codec.vqgan_cuda import CudaDecoder  # its kernels import Triton, which a CPU does not need

    return CudaDecoder(codec, table, dtype=dtype)


def _library(codec: ImageCodec) -> ctypes.CDLL | None:
    """The compiled convolutions, where they compute the codec's decoder."""
    fits = isinstance(codec.config, VqganConfig) and fits_compiled(codec.decoder)
    return convolution_library() if fits else None


def _fastest_way(codec: ImageCodec) -> Way:
    """Of float32 on a CPU."""
    if _library(codec) is not None:
        return "compiled"
    return "row tiles" if isinstance(codec.config, VqganConfig) and not _is_narrow(codec) else "modules"
