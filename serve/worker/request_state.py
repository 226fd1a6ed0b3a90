"""A job between its admission and its last event: what the worker's threads share about it.

    event loop   RequestState(job) ──► stepping thread ──► pictures thread ──► encoding threads
                   events ◄─────────┴──────────────────┴──────────────────┘

Each field is written by one thread at a time, in that order; `is_over` alone is set by whoever ends it.
"""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from engine.pipeline.generation import PreparedRequest
from serve.messages import Finished, GenerationEvent, GenerationJob, Refused


@dataclass(eq=False)
class RequestState:
    """One job in a worker.

    prepared: what `Pipeline.prepare` makes of the job; at once without an init image, else when that is encoded.
    """

    job: GenerationJob
    prepared: Future[PreparedRequest]
    loop: asyncio.AbstractEventLoop
    arrived_s: float  # time.monotonic
    events: asyncio.Queue[GenerationEvent] = field(default_factory=asyncio.Queue)
    rows: dict[int, Tensor] = field(default_factory=dict)  # candidate -> (N,) tokens on the CPU, when finished
    slots: dict[int, int] = field(default_factory=dict)  # candidate -> slot, while it is drawn
    previews_due: dict[int, int] = field(default_factory=dict)  # candidate -> index of its next preview
    previews_waiting: dict[int, "Preview"] = field(default_factory=dict)  # candidate -> the newest, not yet decoded
    timings_s: dict[str, float] = field(default_factory=dict)
    joined_s: float | None = None  # when its first row took a slot
    told_s: float = 0.0  # when Queued or Progress was sent last
    told_position: int | None = None
    is_over: bool = False  # cancelled, refused or finished: nothing more is done for it

    @property
    def request(self) -> PreparedRequest:
        """The prepared request, once a sequence of it was added to the decoder."""
        return self.prepared.result(timeout=0)

    def emit(self, event: GenerationEvent) -> None:
        """Hands an event to the job's reader, from any thread; the last one ends the flight."""
        if self.is_over:
            return
        if isinstance(event, Finished | Refused):
            self.is_over = True
        if not self.loop.is_closed():  # a reader whose loop is gone hears nothing
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(frozen=True, eq=False)
class Preview:
    """A candidate's tokens so far, to be decoded."""

    index: int
    rows_generated: int
    image_tokens: Tensor  # (N,), those that are not drawn yet filled in
