"""The fast decoder of a VQGAN: `Vqgan.decode`, the same pictures up to rounding, in the time that the machine allows.

    CPU, float32 and int8    engine.codec.vqgan_cpu: bands, Winograd or bytes, a picture a thread
    CPU, 16 bit or narrow    the modules, a picture a thread
    GPU                      engine.codec.vqgan_cuda: channels last, one CUDA graph

Codebook and 1x1 convolution behind it are one table of 16,384 x 256 (`latent_table`): a code's latent vector is looked up.

Seconds of processor time a picture, published size, two cores with other work on them, best of alternated runs: the
modules as they are 3.5, ONNX Runtime 3.1, float32 here 2.0, int8 1.2. Bands cost some thousand small operations: a decoder
of 32 channels, whose maps fit the cache whole, is 2.7 times faster without (48 pixels, eight pictures on two cores:
191 ms in bands, 71 ms so; at 64 channels and 64 pixels 321 and 351 ms).

A picture depends on its tokens alone, bit for bit, whatever is decoded beside it.

B pictures, N image tokens, K codes, E width of an entry, Z latent channels, S pixels.
"""

import copy
from typing import Literal

import torch
from torch import Tensor

from engine.codec.threads import single_threads
from engine.codec.vqgan_cpu import CpuDecoder
from engine.codec.vqgan_cuda import CudaDecoder
from engine.device import cpu_capabilities
from engine.errors import InputError
from engine.models.vqgan import Vqgan, to_unit_range

Precision = Literal["float32", "bfloat16", "float16", "int8"]
_WIDE_CHANNELS = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


class FastVqganDecoder:
    """Decodes like the VQGAN that it was made of, from weights of its own, where that one was.

    Args:
        vqgan: stays as it is; on a CPU or a GPU, of any type.
        precision: of weights and maps. `int8`: bytes in the residual blocks' convolutions, float32 elsewhere, CPU only:
            about twice as fast as float32 (benchmarks/results/sample_speed); 61 dB of PSNR from its pictures for the
            demo's codec, 0.2 grey levels in the mean and 4 at most (benchmarks/results/int8_effect).
        bands: float32 on a CPU: decode in bands; None: where the decoder is wide enough for it to pay.

    Raises:
        InputError: unknown precision, or int8 where the machine cannot.
    """

    def __init__(self, vqgan: Vqgan, *, precision: Precision = "float32", bands: bool | None = None) -> None:
        if precision not in _DTYPES:
            raise InputError("precision", precision, f"write one of {', '.join(_DTYPES)}")
        self.config, self.precision = vqgan.config, precision
        self._table = latent_table(vqgan)
        self._device = self._table.device
        if precision == "int8" and not decodes_int8(self._device):
            where = "a GPU" if self._device.type != "cpu" else f"a processor without VNNI ({cpu_capabilities().isa})"
            raise InputError("precision", "int8", f"is not made for {where}: write float32 or bfloat16")
        self._cpu: CpuDecoder | None = None
        self._cuda: CudaDecoder | None = None
        dtype = _DTYPES[precision]
        if self._device.type == "cuda":
            self._cuda = CudaDecoder(vqgan.decoder, self._table, dtype=dtype)
        elif precision == "int8" or (precision == "float32" and _in_bands(vqgan, bands)):
            self._cpu = CpuDecoder(vqgan.decoder, int8=precision == "int8")
        else:
            module = copy.deepcopy(vqgan.decoder).eval().requires_grad_(False)
            is_wide = vqgan.config.base_channels >= _WIDE_CHANNELS
            self._layout = torch.channels_last if is_wide else torch.contiguous_format
            self._module = module.to(dtype=dtype, memory_format=self._layout)
            self._table = self._table.to(dtype)

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Tokens to pictures: (B, N) integers -> (B, 3, S, S) float32 in [0, 1].

        Raises:
            ValueError: wrong shape or type, or a token outside the codebook.
        """
        image_tokens = self._checked(image_tokens)
        if self._cuda is not None:
            images, done = self._cuda.enqueue(image_tokens)
            done.wait()
            return images
        grid, size = self.config.grid_size, self.config.image_size
        if len(image_tokens) == 0:
            return torch.empty(0, 3, size, size)
        if self._cpu is not None:
            pictures = self._cpu.decode(
                lambda number: self._table[image_tokens[number]].view(grid, grid, -1), len(image_tokens)
            )  # each (S, S, 3)
            return to_unit_range(torch.stack(pictures).permute(0, 3, 1, 2)).contiguous()
        latents = self._table[image_tokens].view(-1, grid, grid, self._table.shape[1]).permute(0, 3, 1, 2)
        with single_threads() as (pool, _):
            return torch.cat(list(pool.map(self._decode_alone, latents))).contiguous()

    @torch.inference_mode()
    def _decode_alone(self, latent: Tensor) -> Tensor:
        """(Z, h, w) -> (1, 3, S, S), by the modules, on a thread of its own."""
        return to_unit_range(self._module(latent[None].contiguous(memory_format=self._layout)))

    def decode_async(self, image_tokens: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """On a GPU: starts decoding and returns pictures that may be read after the event (`CudaDecoder.enqueue`).

        The tokens' values are not checked, which would wait for the GPU: give what the sampler drew.

        Raises:
            ValueError: wrong shape, or a decoder on the CPU.
        """
        if self._cuda is None:
            raise ValueError("decode_async: this decoder is on the CPU, call decode")
        self._check_shape(image_tokens)
        return self._cuda.enqueue(image_tokens.long())

    def _check_shape(self, image_tokens: Tensor) -> None:
        N = self.config.image_seq_len
        if image_tokens.dim() != 2 or image_tokens.shape[1] != N:
            raise ValueError(f"image tokens must be (B, {N}), got {tuple(image_tokens.shape)}")
        if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
            raise ValueError(f"image tokens must be integers, not {image_tokens.dtype}")

    def _checked(self, image_tokens: Tensor) -> Tensor:
        self._check_shape(image_tokens)
        image_tokens = image_tokens.long()
        if image_tokens.numel():
            lowest, highest = (int(value) for value in torch.stack(torch.aminmax(image_tokens)).tolist())
            if lowest < 0 or highest >= self.config.codebook_size:
                last = self.config.codebook_size - 1
                raise ValueError(f"image tokens span {lowest}..{highest}; the codebook has 0..{last}")
        return image_tokens


def decodes_int8(device: torch.device) -> bool:
    """Whether `precision="int8"` is possible, and faster than float32, on this device.

    Without VNNI the convolutions would need weights in halves, as the 8-bit linear layers have them
    (engine.decoding.cpu.packed_weights): exact, and 1.5 to 2.3 times slower than Winograd's in float32 (AVX2, one core:
    93 GFLOP/s against 143 to 210).
    """
    return device.type == "cpu" and cpu_capabilities().sums_bytes_exactly


def _in_bands(vqgan: Vqgan, bands: bool | None) -> bool:
    return vqgan.config.base_channels >= _WIDE_CHANNELS if bands is None else bands


@torch.no_grad()
def latent_table(vqgan: Vqgan) -> Tensor:
    """Each code's latent vector, codebook and `post_quant_conv` in one: (K, Z) float32, worked out in float64."""
    matrix = vqgan.post_quant_conv.weight.double()[:, :, 0, 0]  # (Z, E)
    bias = vqgan.post_quant_conv.bias
    assert bias is not None, "a Conv2d has one by default"
    return torch.addmm(bias.double(), vqgan.quantize.embedding.weight.double(), matrix.T).float()
