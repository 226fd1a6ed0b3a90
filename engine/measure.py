"""The physics that logs and benchmarks quote: peaks measured on this machine, work counted, not guessed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def matrix_peak(device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Matrix products of size x size x size in FLOP/s: the ceiling that `share of peak` refers to.

    Measured, because data-sheet peaks are not reached and CPUs differ 10x with their instruction sets. The best of
    several short windows, since a neighbour's load can only slow it down.
    """
    size = size if device.type == "cpu" else 8 * size
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    a @ b
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Waits for queued work: a no-op on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], Any]) -> tuple[Any, int]:
    """Runs `work` and counts the FLOPs of its matrix products, convolutions and attentions, backward included."""
    with _FlopCounter() as counter:
        result = work()
    return result, counter.total


class _FlopCounter(TorchDispatchMode):
    """torch's FLOP formulas without its FlopCounterMode, which breaks operations up before it runs them.

    A step counted by that one has other last bits than the same step uncounted (seen with BatchNorm), and a resumed run
    counts another step than an uninterrupted one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
