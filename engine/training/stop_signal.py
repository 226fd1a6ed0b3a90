"""SIGTERM and SIGINT as a request to stop after the current step."""

import signal
import time
from types import FrameType
from typing import Any

# Launchers hand a signal on, often more than once, and a terminal sends it to every process: within this time it is one
# request.
_SAME_REQUEST_S = 2.0


class StopSignal:
    """Remembers SIGTERM and SIGINT within its block; one that comes seconds later acts as it did before."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > _SAME_REQUEST_S:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
