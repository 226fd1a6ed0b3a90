"""Durations of optimiser steps, measured without waiting for a GPU."""

import time
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
