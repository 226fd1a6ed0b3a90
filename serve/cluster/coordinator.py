"""What all edges and workers of a server share: the keys' rates, and everybody's figures for Prometheus.

One small process holds both, so that a key's limit is one limit however many edges count against it, and so that a
scrape of any edge shows the whole server. It keeps nothing worth saving: after a restart each key's bucket is full
again and the figures are back within a second.

No torch, no ray.
"""

import time
from collections.abc import Callable

from serve.api.rate_limits import RateLimiter

REPORT_EVERY_S = 1.0
# A process that has not reported for so long is gone, and its gauges would be lies.
_STALE_AFTER_S = 5.0


class Coordinator:
    """Called from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limiter = RateLimiter()
        self._reports: dict[str, tuple[float, str]] = {}  # replica: when, Prometheus text

    def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """0.0 when `cost` was taken from the key's bucket, else the seconds after which it could be."""
        return self._limiter.take(key_id, per_minute, cost, self._clock())

    def report(self, replica: str, text: str) -> None:
        """Keeps a process's latest Prometheus text."""
        self._reports[replica] = (self._clock(), text)

    def reports(self) -> dict[str, str]:
        """The latest text of every process that has reported lately, by its name."""
        oldest = self._clock() - _STALE_AFTER_S
        self._reports = {name: report for name, report in self._reports.items() if report[0] >= oldest}
        return {name: text for name, (_, text) in sorted(self._reports.items())}
