"""The state of a job from its admission to its last event, shared by the worker's threads.

    event loop   RequestState(job) ──► decode loop ──► postprocessing thread ──► encoding threads
                   events ◄────────────────┴─────────────────────┴────────────────────────┘

Each field is written by one thread at a time, in that order; only `is_over` is set by whichever thread ends the job.
"""

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from engine.pipeline.generation import PreparedRequest
from serve.messages import Finished, GenerationEvent, GenerationJob, Refused


class RequestOver(Exception):
    """No more work is done for the job."""


@dataclass(eq=False)
class RequestState:
    """One job in a worker.

    prepared: the result of `Pipeline.prepare`: set at once without an init image, else when that is encoded.
    """

    job: GenerationJob
    prepared: Future[PreparedRequest]
    loop: asyncio.AbstractEventLoop
    arrived_s: float  # time.monotonic
    events: asyncio.Queue[GenerationEvent] = field(default_factory=asyncio.Queue)
    image_tokens: dict[int, Tensor] = field(default_factory=dict)  # candidate -> (N,) tokens on the CPU, when finished
    slots: dict[int, int] = field(default_factory=dict)  # candidate -> slot, while it is running
    previews_due: dict[int, int] = field(default_factory=dict)  # candidate -> index of its next preview
    previews_waiting: dict[int, "Preview"] = field(default_factory=dict)  # candidate -> the newest, not yet decoded
    timings_s: dict[str, float] = field(default_factory=dict)
    started_s: float | None = None  # when its first sequence got a slot
    reported_s: float = 0.0  # when Queued or Progress was sent last
    reported_position: int | None = None
    is_over: bool = False  # cancelled, refused or finished: no more work is done for it

    @property
    def request(self) -> PreparedRequest:
        """The prepared request, once a sequence of it was added to the decoder."""
        return self.prepared.result(timeout=0)

    def stop_if_over(self) -> None:
        """For loops of work: raises RequestOver when no more is done for the job, because it has ended or is too late.

        A job past its deadline is refused by this. Its slots are freed by whoever reads that.
        """
        if not self.is_over and time.monotonic() > self.arrived_s + self.job.deadline_s:
            self.emit(Refused("deadline"))
        if self.is_over:
            raise RequestOver

    def emit(self, event: GenerationEvent) -> None:
        """Sends an event to the job's reader, from any thread; `Finished` or `Refused` ends the job."""
        if self.is_over:
            return
        if isinstance(event, Finished | Refused):
            self.is_over = True
        if not self.loop.is_closed():  # otherwise the reader is gone
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(frozen=True, eq=False)
class Preview:
    """A candidate's tokens so far, for a preview."""

    index: int
    rows_generated: int
    image_tokens: Tensor  # (N,), missing ones filled in
