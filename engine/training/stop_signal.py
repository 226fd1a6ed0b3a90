"""SIGTERM and SIGINT as a request to stop after the current step."""

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Remembers SIGTERM and SIGINT within its block; a second one acts as it did before."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._previous[number])
