"""How many threads a compiled step takes: all, or one where the others come too late.

Threads wait for each other some ten times a layer. On a machine that others use, one that has lost its core makes all of them
wait for milliseconds, which is longer than a small model's step. So both ways are timed as steps go by, and the faster one
is taken. The bits of a step do not depend on it.
"""

import time
from collections.abc import Callable

_RETRY = 50  # the slower way is tried again after so many times its own time: it costs 2 % at most
_NEWEST, _NEWEST_RETRY = 0.25, 0.5  # what a step counts in the running mean


class ThreadChoice:
    """Chooses for steps of one kind, whose times compare.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_threads = 1
        self._mean_s: dict[int, float] = {}  # of a step, by threads
        self._since_retry_s = 0.0

    def run(self, work: Callable[[int], None], num_threads: int) -> None:
        """Calls `work` with `num_threads` or with 1."""
        if num_threads == 1:
            work(1)
            return
        if num_threads != self._num_threads:
            self._num_threads, self._mean_s, self._since_retry_s = num_threads, {}, 0.0
        chosen, is_retry = self._choose()
        started = self._clock()
        work(chosen)
        seconds = self._clock() - started
        mean_s = self._mean_s.get(chosen, seconds)
        self._mean_s[chosen] = mean_s + (_NEWEST_RETRY if is_retry else _NEWEST) * (seconds - mean_s)
        self._since_retry_s = 0.0 if is_retry else self._since_retry_s + seconds

    def _choose(self) -> tuple[int, bool]:
        """Threads of the next step, and whether it tries the slower way again."""
        for untried in (1, self._num_threads):
            if untried not in self._mean_s:
                return untried, False
        faster, slower = sorted(self._mean_s, key=lambda count: self._mean_s[count])
        is_retry = self._since_retry_s > _RETRY * self._mean_s[slower]
        return slower if is_retry else faster, is_retry
