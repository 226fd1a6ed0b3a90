"""3x3 convolutions of one image in C++, for CPUs: Winograd's, with what stands before and after (kernels/cpu/convolution.h).

    source -> SiLU(scale * x + shift) -> (doubled) -> convolution + bias -> target (+=) -> moments by channel

An image is computed in blocks of tiles of 4 x 4 pixels. A block's transformed tiles stay in a core's second-level cache, the sums of
its products in registers; pixels are activated as they are read, and the target is read and written once. Blocks are independent, and
every sum has one order: no bit depends on threads, on other images or on the instruction set.

The points are those of kernels.winograd. The transform in is scaled so that its rows are polynomials with a leading coefficient of 1,
the weights' transform the other way.

H x W source pixels, C channels in, K out, B blocks.
"""

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.compiled import InstructionSet, load_library
from kernels.winograd import monic_spectra

LANES = 16  # channels in must be a multiple
_INTERFACE = 1  # of convolution.h
_Pointer, _Int = ctypes.c_void_p, ctypes.c_int32


class _Convolution(ctypes.Structure):
    _fields_ = [("inputs", _Int), ("outputs", _Int), ("doubled", _Int), ("panels", _Pointer), ("bias", _Pointer)]


class _Image(ctypes.Structure):
    _fields_ = [
        ("height", _Int), ("width", _Int), ("source", _Pointer), ("scale", _Pointer), ("shift", _Pointer),
        ("target", _Pointer), ("add", _Int), ("moments", _Pointer), ("counts", _Pointer),
    ]  # fmt: skip


@functools.cache
def load(instructions: InstructionSet) -> ctypes.CDLL | None:
    """The library, loaded once a process; None where the package was installed without it."""
    library = load_library("convolution", instructions, "kodalle_convolution_interface", _INTERFACE)
    if library is None:
        return None
    convolution = ctypes.POINTER(_Convolution)
    library.kodalle_convolution_floats.argtypes = [convolution]
    library.kodalle_convolution_floats.restype = ctypes.c_int64
    library.kodalle_pack_convolution.argtypes = [convolution, _Pointer, _Pointer]
    library.kodalle_pack_convolution.restype = None
    library.kodalle_convolution_blocks.argtypes = [convolution, _Int, _Int]
    library.kodalle_convolution_blocks.restype = _Int
    library.kodalle_convolve.argtypes = [convolution, ctypes.POINTER(_Image), _Int, _Int]
    library.kodalle_convolve.restype = None
    return library


class CompiledConv:
    """A 3x3 convolution, stride 1, zero padding 1; with `doubled`, of the image enlarged twofold first.

    Args:
        library: from `load`.
        weight: (K, C, 3, 3), C a multiple of 16. Kept transformed, in float32: four times its size (with `doubled` 2.8 times).
        bias: (K,).
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor, *, doubled: bool = False) -> None:
        K, C = weight.shape[:2]
        if C % LANES:
            raise ValueError(f"the channels in must be a multiple of {LANES}, got {C}")
        self._library = library
        self.channels_in, self.channels_out, self.scale = C, K, 2 if doubled else 1
        self.padded_channels = -(-K // LANES) * LANES  # of the moments
        self._bias = F.pad(bias.detach().float(), (0, self.padded_channels - K)).contiguous()
        self._struct = _Convolution(C, K, int(doubled), None, self._bias.data_ptr())
        spectra = monic_spectra(weight, doubled=doubled)
        floats = library.kodalle_convolution_floats(ctypes.byref(self._struct))
        self._panels = torch.empty(floats + LANES, dtype=torch.float32, device=weight.device)
        self._struct.panels = self._panels.data_ptr() + -self._panels.data_ptr() % 64  # panels begin at cache lines
        library.kodalle_pack_convolution(ctypes.byref(self._struct), spectra.data_ptr(), self._struct.panels)

    def num_blocks(self, height: int, width: int) -> int:
        """B of a source of that size."""
        return int(self._library.kodalle_convolution_blocks(ctypes.byref(self._struct), height, width))

    def __call__(
        self,
        source: Tensor,
        target: Tensor,
        first: int,
        last: int,
        *,
        activation: tuple[Tensor, Tensor] | None = None,
        add: bool = False,
        moments: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Computes the blocks first .. last - 1 on the calling thread.

        Args:
            source: (H, W, C) float32, contiguous.
            target: (scale * H, scale * W, K) float32, contiguous; these blocks' pixels are written.
            activation: (C,) scale and (C,) shift of SiLU(scale * x + shift); None: the source as it is.
            add: onto what `target` holds.
            moments: (B, 4, K rounded up to whole lanes) float32; mean, variance, lowest and highest value of a block's pixels are
                written. With `counts` (B,) float32, their number.

        Raises:
            ValueError: another shape, dtype or layout.
        """
        H, W, C = source.shape
        blocks = self.num_blocks(H, W)
        _check("source", source, (H, W, self.channels_in))
        _check("target", target, (self.scale * H, self.scale * W, self.channels_out))
        scale, shift = activation if activation is not None else (None, None)
        if scale is not None and shift is not None:
            _check("scale", scale, (C,))
            _check("shift", shift, (C,))
        if moments is not None and counts is not None:
            _check("moments", moments, (blocks, 4, self.padded_channels))
            _check("counts", counts, (blocks,))
        if not 0 <= first <= last <= blocks:
            raise ValueError(f"blocks {first} to {last} of {blocks}")
        image = _Image(
            H, W, source.data_ptr(), _pointer(scale), _pointer(shift), target.data_ptr(), int(add), _pointer(moments),
            _pointer(counts),
        )  # fmt: skip
        self._library.kodalle_convolve(ctypes.byref(self._struct), ctypes.byref(image), first, last)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{name} must be {shape} float32, contiguous, got {tuple(tensor.shape)} {tensor.dtype}, {layout}"
        )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
