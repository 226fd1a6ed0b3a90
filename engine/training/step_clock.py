"""Durations of optimiser steps, measured without waiting for a GPU."""

import statistics
import time
from collections import deque
from collections.abc import Callable

import torch


class StepClock:
    """Start and stop around a step: the host's clock on CPU, two events on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: float | torch.cuda.Event = 0.0

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> Callable[[], float]:
        """Returns what gives the seconds since `start`; calling it waits for the GPU to have come so far."""
        started, stopped = self._started, self._now()

        def seconds() -> float:
            if isinstance(started, float):
                assert isinstance(stopped, float), stopped
                return stopped - started
            assert isinstance(stopped, torch.cuda.Event), stopped
            stopped.synchronize()
            return started.elapsed_time(stopped) / 1000.0

        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class SlowSteps:
    """Finds steps that take ten times as long as is usual: another program has the processors, or a disk is stuck."""

    TIMES = 10.0
    LEAST_S = 1.0  # shorter ones delay no one
    QUIET_STEPS = 50  # after a report; what stays slow becomes the usual meanwhile

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=50)
        self._pending: list[tuple[int, Callable[[], float]]] = []
        self._quiet_until = 0

    def add(self, step: int, seconds: Callable[[], float]) -> None:
        self._pending.append((step, seconds))

    def reports(self) -> list[str]:
        """A line for each slow step since the last call, which waits for a GPU."""
        lines = []
        for step, read in self._pending:
            seconds = read()
            if len(self._recent) >= 5 and step > self._quiet_until:
                usual = statistics.median(self._recent)
                if seconds > max(self.LEAST_S, self.TIMES * usual):
                    lines.append(
                        f"note: step {step} took {seconds:.1f} s, {usual:.2g} s are usual: other programs may have the "
                        "processors; OMP_NUM_THREADS or loop.torch_threads limits the threads of this one"
                    )
                    self._quiet_until = step + self.QUIET_STEPS
            self._recent.append(seconds)
        self._pending.clear()
        return lines
