"""What workers refused a moment ago, so that a crowd is refused without asking them about each of it.

Far too many requests are refused by the very processes that could draw instead. For `KEPT_S` after every worker that was
asked had no room, an edge gives the same answer by itself to what needs as much room and is the same key's: workers share
their queues out by key.

No torch, no ray.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.messages import GenerationJob, Refused

KEPT_S = 0.25


@dataclass(frozen=True)
class _Note:
    until_s: float
    num_slots: int
    refused: Refused


class SaturatedWorkers:
    """Called from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notes: dict[str, _Note] = {}  # by key

    def note(self, job: GenerationJob, refused: Refused) -> None:
        """No worker had room for this job."""
        now = self._clock()
        self._notes = {key: note for key, note in self._notes.items() if note.until_s > now}
        self._notes[job.key_id] = _Note(now + KEPT_S, _num_slots(job), refused)

    def refusal(self, job: GenerationJob) -> Refused | None:
        """The same answer, where this job would get it too."""
        note = self._notes.get(job.key_id)
        if note is None or self._clock() >= note.until_s or _num_slots(job) < note.num_slots:
            return None
        return note.refused


def _num_slots(job: GenerationJob) -> int:
    return job.num_candidates * (1 + job.sampling_params.is_guided)
