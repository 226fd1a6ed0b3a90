"""Numbered steps of a command that takes long, with the time that went by and the time left over the whole."""

import math
import sys
import time
from collections.abc import Callable, Mapping

from engine.commands.train import StoppedTraining
from engine.progress import seconds_text

_RESUMED = 0.2  # of the expected time: a step that takes less was done, wholly or for the most part, by an earlier run


class Steps:
    """Runs named steps one after the other and keeps the seconds that each took.

    Args:
        titles: of all steps, in order.
        expected_s: seconds that steps are expected to take; those without are not counted. The time left follows the pace of the
            steps that were done: other programs may have the processors, or have had them while the expectation was made.
    """

    def __init__(self, titles: Mapping[str, str], expected_s: Mapping[str, float] | None = None) -> None:
        self._titles = dict(titles)
        self._expected_s = dict(expected_s or {})
        self._started = time.monotonic()
        self._paced_s = self._paced_expected_s = 0.0  # of the steps that were done, and what had been expected of them
        self.seconds: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._started

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Prints the step's title and does it."""
        number = list(self._titles).index(name) + 1
        print(f"[{number}/{len(self._titles)}] {self._titles[name]}  ({self._times(name)})", flush=True)
        started = time.monotonic()
        try:
            work()
        except StoppedTraining:
            raise
        except (
            KeyboardInterrupt,
            SystemExit,
        ) as stop:  # SIGINT, or SIGTERM as engine/commands/error_lines.py raises it
            code = stop.code if isinstance(stop, SystemExit) else 130
            print(f"stopped while {self._titles[name]}: run the same command to go on", file=sys.stderr, flush=True)
            raise SystemExit(code) from stop
        taken_s = time.monotonic() - started
        self.seconds[name] = round(taken_s, 1)
        if taken_s > _RESUMED * self._expected_s.get(name, math.inf):
            self._paced_s += taken_s
            self._paced_expected_s += self._expected_s[name]

    def _times(self, name: str) -> str:
        so_far = f"{seconds_text(self.total_s)} so far"
        names = list(self._titles)
        pace = self._paced_s / self._paced_expected_s if self._paced_expected_s else 1.0
        left = pace * sum(self._expected_s.get(each, 0.0) for each in names[names.index(name) :])
        return f"{so_far}, about {seconds_text(left)} left" if left else so_far
