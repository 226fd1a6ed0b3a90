"""Roofline of training and generation: peaks measured on this machine, FLOPs and bytes counted, least times of a step.

Generation is limited by memory bandwidth: a step at the published sizes reads 504 MB of 16-bit weights and computes
0.5 GFLOP a sequence, so below about 180 sequences on an H200 the time is bytes / bandwidth. The formulas give the floor
that measured times are compared with: each weight, key and value is read once a step, one position written.

Letters: L layers, D model dim, A heads * head dim, F feed-forward inner dim, V_I image vocabulary, V_T text vocabulary
with its reserved rows, P prefix positions, N image tokens, B sequences, G captions.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def matrix_peak(device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of matrix products of size x size x size: the ceiling that `share of peak` refers to.

    Measured, because data-sheet peaks are not reached and CPUs differ 10x with their instruction sets. The best of
    several short windows, since other load only slows it down. int8 sums in int32.
    """
    size = size if device.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    product = torch._int_mm if dtype == torch.int8 else torch.matmul

    def products() -> None:
        for _ in range(4):
            product(a, b)

    return 4 * 2 * size**3 / _best_s(products, device, seconds)


def read_bandwidth(device: torch.device, *, num_bytes: int | None = None, seconds: float = 1.0) -> float:
    """Read bandwidth of all threads, or the GPU, in bytes/s: the ceiling that `share of roofline` refers to.

    The better of a sum and a matrix-vector product, since either may be limited by its arithmetic.

    Args:
        num_bytes: of the buffer, far more than the last cache holds (an H200 50 MB, server processors some hundred);
            default 512 MiB on CPU, 4 GiB on a GPU, where launches take half the time of shorter reads.
    """
    num_bytes = num_bytes or (1 << 29 if device.type == "cpu" else 1 << 32)
    matrix = torch.ones(8192, num_bytes // (4 * 8192), dtype=torch.float32, device=device)
    vector = torch.ones(matrix.shape[1], dtype=torch.float32, device=device)
    fastest_s = min(_best_s(work, device, seconds / 2) for work in (matrix.sum, lambda: matrix @ vector))
    return matrix.numel() * 4 / fastest_s


def time_runs(
    work: Callable[[], Any], device: torch.device, *, repeat: int, budget_s: float = float("inf")
) -> list[float]:
    """Seconds of each of `repeat` runs, or of as many as start within `budget_s`, at least one. Warm up before."""
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < repeat and (not seconds or time.perf_counter() - started < budget_s):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _best_s(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, at least one; warm."""
    work()
    return min(time_runs(work, device, repeat=1_000_000, budget_s=seconds))


def synchronize(device: torch.device) -> None:
    """Waits for queued work: a no-op on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `work` and the FLOPs of its matrix products, convolutions and attentions, backward included."""
    with _FlopCounter() as counter:
        result = work()
    return result, counter.total


# Under torch.inference_mode these arrive undecomposed and have no formula; outside it torch decomposes them before.
_WHOLE_IN_INFERENCE_MODE = {
    torch.ops.aten.linear,
    torch.ops.aten.matmul,
    torch.ops.aten.einsum,
    torch.ops.aten.conv2d,
    torch.ops.aten.scaled_dot_product_attention,
}


class _FlopCounter(TorchDispatchMode):
    """torch's FLOP formulas without its FlopCounterMode, which decomposes operations before it runs them.

    A step counted by that one differs in the last bits from the same step uncounted (seen with BatchNorm), and a
    resumed run counts another step than an uninterrupted one. Attention on CPU, for which torch has no formula, is
    counted too; as in torch, in full, with the half that causality masks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _WHOLE_IN_INFERENCE_MODE:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        elif func.overloadpacket == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif func.overloadpacket == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        return out


# ------------------------------------------------------------------------------------------------------------ roofline


class TransformerSizes(Protocol):
    """The sizes of `engine.config.transformer.TransformerConfig` that the formulas need."""

    @property
    def dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ff_mult(self) -> int: ...
    @property
    def image_vocab_size(self) -> int: ...
    @property
    def image_seq_len(self) -> int: ...
    @property
    def joint_vocab_size(self) -> int: ...
    @property
    def prefix_len(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """A batch whose sequences are decoded in step.

    num_sequences: B.
    num_captions: G, prefixes that are stored and read once each; equal to `num_sequences` where none is shared.
    weight_bytes: of one weight element; 1 for int8.
    kv_bytes: of one key or value element.
    """

    num_sequences: int
    num_captions: int
    weight_bytes: float
    kv_bytes: float


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, as `read_bandwidth` and `matrix_peak` measure them."""

    read_bytes_per_s: float
    flop_per_s: float


def layer_weights(sizes: TransformerSizes) -> int:
    """qkv, out, grow, shrink, two norms, two LayerScales: 14,696,448 at the published sizes."""
    D, A, F = sizes.dim, _inner_dim(sizes), sizes.ff_mult * sizes.dim
    return 3 * D * A + (A * D + D) + (2 * D * F + 2 * F) + (F * D + D) + 4 * D + 2 * D


def step_weights(sizes: TransformerSizes) -> int:
    """Weights that a step must read: all layers and the image rows of the head. Published sizes: 251.94 M."""
    return sizes.num_layers * layer_weights(sizes) + (sizes.dim + 1) * sizes.image_vocab_size


def kv_position_bytes(sizes: TransformerSizes, load: Workload) -> float:
    """Keys and values of one position, all layers: 32 KiB at the published sizes in 16 bit."""
    return 2 * sizes.num_layers * _inner_dim(sizes) * load.kv_bytes


def step_bytes(sizes: TransformerSizes, load: Workload, own_positions: float) -> float:
    """Least bytes of a step whose sequences attend to `own_positions` of their own, the new one included."""
    positions = load.num_captions * sizes.prefix_len + load.num_sequences * own_positions + load.num_sequences
    return load.weight_bytes * step_weights(sizes) + kv_position_bytes(sizes, load) * positions


def step_flops(sizes: TransformerSizes, load: Workload, own_positions: float) -> float:
    """FLOP of a step whose sequences attend to `own_positions` of their own."""
    attended = 4 * sizes.num_layers * _inner_dim(sizes) * (sizes.prefix_len + own_positions)
    return load.num_sequences * (2 * step_weights(sizes) + attended)


def mean_step_bytes(sizes: TransformerSizes, load: Workload) -> float:
    """`step_bytes` averaged over the N - 1 steps of a generation."""
    return step_bytes(sizes, load, sizes.image_seq_len / 2)


def decode_floor_s(sizes: TransformerSizes, load: Workload, machine: Machine) -> float:
    """Least seconds of the N - 1 steps of a generation; prefill samples the first token."""
    return sum(
        max(step_bytes(sizes, load, own) / machine.read_bytes_per_s, step_flops(sizes, load, own) / machine.flop_per_s)
        for own in range(1, sizes.image_seq_len)
    )


def prefill_flops(sizes: TransformerSizes, num_captions: int) -> float:
    """FLOP of reading captions and predicting the first image token: 0.061 T a caption at the published sizes."""
    L, P = sizes.num_layers, sizes.prefix_len
    layers = 2 * L * layer_weights(sizes) * P + 2 * L * _inner_dim(sizes) * P**2
    return num_captions * (layers + 2 * sizes.dim * sizes.image_vocab_size)


def prefill_floor_s(sizes: TransformerSizes, load: Workload, machine: Machine) -> float:
    """Least seconds of reading the batch's captions."""
    written = kv_position_bytes(sizes, load) * load.num_captions * sizes.prefix_len
    moved = load.weight_bytes * step_weights(sizes) + written
    return max(prefill_flops(sizes, load.num_captions) / machine.flop_per_s, moved / machine.read_bytes_per_s)


def uncached_flops(sizes: TransformerSizes) -> float:
    """FLOP of one image in the ancestors' loop: all positions again for each token, the joint head on each."""
    per_position = 2 * (sizes.num_layers * layer_weights(sizes) + sizes.dim * sizes.joint_vocab_size)
    attended = 4 * sizes.num_layers * _inner_dim(sizes)
    lengths = range(sizes.prefix_len, sizes.prefix_len + sizes.image_seq_len)
    return float(sum(per_position * length + attended * length**2 for length in lengths))


def sum_over_lengths(lengths: list[int], seconds: list[float]) -> float:
    """Seconds of one step at every length from the first to the last, from steps timed at some of them.

    Interpolates linearly between timed lengths (the trapezoid rule, on whole lengths).

    Args:
        lengths: ascending, at least two.
        seconds: of one step at each.
    """
    assert len(lengths) == len(seconds) >= 2, (lengths, seconds)
    assert all(one < other for one, other in itertools.pairwise(lengths)), lengths
    total = seconds[0]
    timed = zip(lengths, seconds, strict=True)
    for (start, first), (end, last) in itertools.pairwise(timed):
        steps = end - start
        total += steps * first + (last - first) * (steps + 1) / 2  # lengths start + 1 .. end
    return total


def _inner_dim(sizes: TransformerSizes) -> int:
    return sizes.num_heads * sizes.head_dim
