"""State shared by all API servers and workers of a server: rate limits of the keys, and metrics of every process.

One small process holds both, so a key has one limit however many API servers count against it, and a scrape of any API
server shows the whole server. Nothing here is worth saving: after a restart each key's bucket is full again and all
metrics have been reported within a second.

No torch, no ray.
"""

import time
from collections.abc import Callable

from serve.api.rate_limits import RateLimiter

REPORT_EVERY_S = 1.0
# A process that has not reported for this long is gone, and its gauges would be wrong.
_STALE_AFTER_S = 5.0


class Coordinator:
    """Called from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limiter = RateLimiter()
        self._reports: dict[str, tuple[float, str]] = {}  # replica: time of the report, Prometheus text

    def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """Takes `cost` from the key's bucket; returns 0.0, or the seconds after which a retry can succeed."""
        return self._limiter.take(key_id, per_minute, cost, self._clock())

    def report(self, replica: str, text: str) -> None:
        """Stores a process's latest Prometheus text."""
        self._reports[replica] = (self._clock(), text)

    def reports(self) -> dict[str, str]:
        """The latest Prometheus text of every live process, by its name."""
        oldest = self._clock() - _STALE_AFTER_S
        self._reports = {name: report for name, report in self._reports.items() if report[0] >= oldest}
        return {name: text for name, (_, text) in sorted(self._reports.items())}
