"""Progress with time left: a live bar on a terminal, a plain line every few seconds in a log file or CI."""

import sys
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_EVERY_S = 10.0


class ProgressBar:
    """`with ProgressBar("vqgan", total=900) as bar: bar.update(120, "loss 0.12")`; silent when `enabled` is False.

    Args:
        start: what was done before, by an earlier process.
        log: a file that gets the plain lines too, with the time before each, whether or not `enabled`.
    """

    def __init__(self, name: str, *, total: int, start: int = 0, enabled: bool = True, log: Path | None = None) -> None:
        self.name = name
        self.total = total
        self.enabled = enabled
        self._log = log
        self._start = start
        self._started = self._printed = time.monotonic()
        self._live: Progress | None = None
        if enabled and sys.stdout.isatty():
            self._live = _live_bar()
            self._task = self._live.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> "ProgressBar":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of `total` are finished."""
        if not self.enabled and self._log is None:
            return
        if self._live is not None:
            self._live.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if now - self._printed >= PLAIN_EVERY_S or done == self.total:
            self._printed = now
            pace = (now - self._started) / max(1, done - self._start)
            left = seconds_text(pace * (self.total - done))
            line = f"{self.name} {done}/{self.total}, {left} left {note}".rstrip()
            if self.enabled and self._live is None:
                print(line, flush=True)
            if self._log is not None:
                with self._log.open("a", encoding="utf-8") as log:
                    log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")


class PhaseBars:
    """One progress bar a phase, for work that reports (phase, done, total)."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def __enter__(self) -> "PhaseBars":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def update(self, phase: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.name != phase:
            self._end()
            self._bar = ProgressBar(phase, total=total)
            self._bar.__enter__()
        self._bar.update(done)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _live_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stdout),
    )


def seconds_text(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
