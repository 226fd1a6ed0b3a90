"""Cache of `queue_full` refusals in an API server, so that under overload the workers need not refuse every request.

Refusing far too many requests would take time from the very processes that generate. For `TTL_S` after every worker tried
had no room, an API server gives the same answer by itself to requests of the same key that need at least as many slots:
workers divide their queues by key.

No torch, no ray.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.messages import GenerationJob, Refused

TTL_S = 0.25


@dataclass(frozen=True)
class _Refusal:
    until_s: float
    num_slots: int
    refused: Refused


class SaturatedWorkers:
    """The latest refusal of each key. Called from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}  # by key

    def record(self, job: GenerationJob, refused: Refused) -> None:
        """Remembers that no worker had room for this job."""
        now = self._clock()
        self._refusals = {key: one for key, one in self._refusals.items() if one.until_s > now}
        self._refusals[job.key_id] = _Refusal(now + TTL_S, _num_slots(job), refused)

    def refusal(self, job: GenerationJob) -> Refused | None:
        """The cached refusal that applies to this job; None: send it to a worker."""
        found = self._refusals.get(job.key_id)
        if found is None or self._clock() >= found.until_s or _num_slots(job) < found.num_slots:
            return None
        return found.refused


def _num_slots(job: GenerationJob) -> int:
    return job.num_candidates * (1 + job.sampling_params.is_guided)
