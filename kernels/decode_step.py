"""The decode step in C++ (kernels/cpu/step.h): its structures for ctypes, and the library of an instruction set.

R rows, N outputs, K inputs, V image vocabulary.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.compiled import InstructionSet, load_library

WeightKind = Literal["float32", "int8", "int4"]
_KINDS: dict[WeightKind, int] = {"float32": 0, "int8": 1, "int4": 2}
ACTIVATIONS = {"geglu": 0, "gelu": 1, "quick_gelu": 2}
GROUP = 64  # inputs that share a scale in int4
PARTS = (
    "norms",
    "quantisation",
    "qkv",
    "attention",
    "out",
    "grow",
    "activation",
    "shrink",
    "head",
    "sampling",
    "waiting",
)  # of step.h
LANES = 16  # what outputs and channels must be a multiple of
_INTERFACE = 2  # of step.h
_SCORES_OF_A_THREAD = 1 << 16  # a sixth of a millisecond: less is sampled before another thread wakes
_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Linear(ctypes.Structure):
    _fields_ = [
        ("kind", _Int), ("inputs", _Int), ("outputs", _Int), ("panels", _Pointer), ("scales", _Pointer), ("bias", _Pointer)
    ]  # fmt: skip


class LayerNorm(ctypes.Structure):
    _fields_ = [("weight", _Pointer), ("bias", _Pointer), ("epsilon", _Float)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", LayerNorm), ("qkv", Linear), ("out", Linear), ("feed_forward_norm", LayerNorm),
        ("grow", Linear), ("shrink", Linear), ("keep", _Float), ("add", _Float),
    ]  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("dim", "num_layers", "num_heads", "head_dim", "inner_dim", "activation")),
        ("normalises_heads", _Int), ("mixes", _Int), ("query_gain", _Float), ("head_epsilon", _Float),
        ("layers", ctypes.POINTER(Layer)), ("tokens", _Pointer), ("positions", _Pointer), ("head_norm", LayerNorm),
        ("head", Linear),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        ("num_sequences", _Int), ("num_blocks", _Int), ("num_prefix", _Int), ("keys", _Pointer), ("values", _Pointer)
    ]  # fmt: skip


class Prefixes(ctypes.Structure):
    _fields_ = [("keys", _Pointer), ("values", _Pointer), ("values_per_layer", _Pointer)]


class Feed(ctypes.Structure):
    _fields_ = [
        ("num_rows", _Int), ("tokens", _Pointer), ("sequences", _Pointer), ("positions", _Pointer),
        ("hidden_rows", _Pointer), ("hidden", _Pointer),
    ]  # fmt: skip


class Predict(ctypes.Structure):
    _fields_ = [
        ("num_rows", _Int), ("hidden", _Pointer), ("rows", _Pointer), ("unconditional", _Pointer),
        ("guidance", _Pointer), ("logits", _Pointer),
    ]  # fmt: skip


class Sample(ctypes.Structure):
    _fields_ = [
        ("num_rows", _Int), ("num_tokens", _Int), ("scores", _Pointer), ("temperature", _Pointer), ("seeds", _Pointer),
        ("candidates", _Pointer), ("positions", _Pointer), ("tokens", _Pointer), ("is_close", _Pointer),
    ]  # fmt: skip


@functools.cache
def load(instructions: InstructionSet) -> ctypes.CDLL | None:
    """The library, loaded once a process; None where the package was installed without it.

    The caller knows that the processor has the instructions.
    """
    library = load_library("decode_step", instructions, "kodalle_interface", _INTERFACE)
    if library is None:
        return None
    library.kodalle_packed_bytes.argtypes = [_Int, ctypes.c_int64, ctypes.c_int64]
    library.kodalle_packed_bytes.restype = ctypes.c_int64
    library.kodalle_pack.argtypes = [_Int, ctypes.c_int64, ctypes.c_int64, _Pointer, _Pointer, _Pointer]
    library.kodalle_multiply.argtypes = [ctypes.POINTER(Linear), _Int, _Pointer, _Pointer, _Int]
    library.kodalle_feed.argtypes = [*(ctypes.POINTER(part) for part in (Model, Cache, Prefixes, Feed)), _Int]
    library.kodalle_predict.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Predict), _Int]
    library.kodalle_sample.argtypes = [ctypes.POINTER(Sample), _Int]
    library.kodalle_time.argtypes = [_Pointer]
    for name in ("time", "pack", "multiply", "feed", "predict", "sample"):
        getattr(library, f"kodalle_{name}").restype = None
    return library


@contextlib.contextmanager
def timed(library: ctypes.CDLL) -> Iterator[Tensor]:
    """Counts nanoseconds by thread and part, (threads, PARTS) int64, in all steps inside the block."""
    nanoseconds = torch.zeros(torch.get_num_threads(), len(PARTS), dtype=torch.int64, device="cpu")
    library.kodalle_time(nanoseconds.data_ptr())
    try:
        yield nanoseconds
    finally:
        library.kodalle_time(None)


class PackedLinear:
    """A linear layer in the library's layout.

    Args:
        weight: (N, K) float32, N a multiple of 16, K of 16 and for int4 of 64.
        bias: (N,) or None.
        kind: int8: one scale an output, its largest weight is 127; int4: one scale for each 64 inputs of an output.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, kind: WeightKind) -> None:
        (N, K), device = weight.shape, weight.device
        weight = weight.detach().float().contiguous()
        self._library = library
        self._bias = None if bias is None else bias.detach().float().contiguous()
        scales = None
        if kind == "int8":
            weight, scales = quantise_weight(weight)
        elif kind == "int4":
            weight, scales = quantise_groups(weight)
        number = _KINDS[kind]
        self._panels = torch.empty(library.kodalle_packed_bytes(number, N, K) + 64, dtype=torch.uint8, device=device)
        start = -self._panels.data_ptr() % 64  # panels begin at cache lines
        panels = self._panels.data_ptr() + start
        library.kodalle_pack(number, N, K, weight.data_ptr(), pointer(scales), panels)
        self._scales = scales if kind == "int8" else None
        self.struct = Linear(number, K, N, panels, pointer(self._scales), pointer(self._bias))

    def __call__(self, x: Tensor) -> Tensor:
        """(R, K) float32 -> (R, N) float32."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.struct.outputs)
        self._library.kodalle_multiply(
            ctypes.byref(self.struct), x.shape[0], x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        )
        return y


def sample(
    library: ctypes.CDLL, logits: Tensor, seeds: Tensor, candidates: Tensor, positions: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples one token a row without filters, as `kernels.reference.sample` does.

    Args:
        logits: (R, V) float32, contiguous, V a multiple of 16; -inf where a filter removed them.
        seeds, candidates, positions: (R,) int64.
        temperature: (R,) float32; 0 takes the argmax.

    Returns:
        (R,) int64 token ids; (R,) bool: whether another token's score is so near that rounding may decide.
    """
    R, V = logits.shape
    assert logits.is_contiguous(), logits.stride()
    tokens = torch.empty(R, dtype=torch.int64, device=logits.device)
    is_close = torch.empty(R, dtype=torch.bool, device=logits.device)
    columns = [column.contiguous() for column in (temperature, seeds, candidates, positions)]
    job = Sample(R, V, logits.data_ptr(), *(part.data_ptr() for part in (*columns, tokens, is_close)))
    num_threads = 1 if R * V < _SCORES_OF_A_THREAD else torch.get_num_threads()
    library.kodalle_sample(ctypes.byref(job), num_threads)
    return tokens, is_close


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> integers -127..127 (N, K) int8, and an output's scale (N,)."""
    scales = weight.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny).div_(127)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> integers -8..7 (N, K) int8, and the scales (N, K / 64) of their groups.

    The largest weight of a group becomes -8 or, where that leaves less error, 7: of 16 steps 15 would go to waste otherwise.
    """
    N, K = weight.shape
    groups = weight.view(N, K // GROUP, GROUP)
    tiny = torch.finfo(torch.float32).tiny
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # with its sign
    best, best_error, best_scales = None, None, None
    for divisor in (-8.0, -8.5, -9.0, 7.0, 7.5, 8.0):
        scales = most / divisor
        scales = torch.where(scales.abs() < tiny, tiny, scales)
        rounded = (groups / scales).round_().clamp_(-8, 7)
        error = (rounded * scales - groups).square_().sum(2, keepdim=True)
        if best is None or best_error is None or best_scales is None:
            best, best_error, best_scales = rounded, error, scales
        else:
            better = error < best_error
            best = torch.where(better, rounded, best)
            best_error = torch.where(better, error, best_error)
            best_scales = torch.where(better, scales, best_scales)
    assert best is not None
    assert best_scales is not None
    return best.to(torch.int8).view(N, K), best_scales[:, :, 0].contiguous()
