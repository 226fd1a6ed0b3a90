"""Re-runs: a job whose worker dies is sent to another worker, and events that the client already has are not repeated.

The images of a job are determined before it is sent (seed, sampling parameters, init image), so another worker generates
the same bytes and the client sees nothing but a pause. Ray Serve itself never repeats a request that was sent.

How a worker's death is detected:

    the call fails       a killed process: within milliseconds
    silence              an unreachable host closes no connection. A worker sends an event or a heartbeat every
                         `HEARTBEAT_S`; after `SILENCE_S` without either the job is sent elsewhere. Ray's own health check
                         of a node takes up to a minute.

A job that kills every worker that accepts it is given up after `MAX_DEATHS` of them. A worker's refusal is final, except
that for a worker that is draining or full one other is tried. Once a worker that had accepted the job has died, full
queues are no refusal any more: the job is sent until one worker has room or its deadline has passed.

No torch, no ray.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from serve.cluster.saturated_workers import SaturatedWorkers
from serve.messages import Finished, GenerationEvent, GenerationJob, Partial, Progress, Refused

HEARTBEAT_S = 1.0
SILENCE_S = 5.0
MAX_DEATHS = 3
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 0.5
_TRY_ANOTHER = ("draining", "queue_full")

_log = logging.getLogger(__name__)

# Sends a job to some worker. The first item, None, says that the worker has the job; later None items are heartbeats.
Send = Callable[[GenerationJob], AsyncGenerator[GenerationEvent | None, None]]


class WorkerLost(Exception):
    """The worker of a job died or is unreachable; raised by `Send`."""


async def generate_with_reruns(
    send: Send,
    job: GenerationJob,
    *,
    on_rerun: Callable[[], None],
    saturated_workers: SaturatedWorkers | None = None,
    silence_s: float = SILENCE_S,
) -> AsyncIterator[GenerationEvent]:
    """The job's events, each once, from however many workers; the last is `Finished` or `Refused`.

    Args:
        on_rerun: called whenever a job that a worker had accepted is sent again.
        saturated_workers: cached refusals of this API server; None: every job is sent to a worker.
    """
    if saturated_workers is not None and (refusal := saturated_workers.refusal(job)) is not None:
        yield refusal
        return
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + job.deadline_s
    delivered = _Delivered()
    tried_another: set[str] = set()
    num_deaths = 0
    while True:
        left_s = ends_at - loop.time()
        if left_s <= 0:
            yield Refused("deadline")
            return
        was_accepted, pause_s = False, _PAUSE_S
        try:
            async with aclosing(_until_silent(send(replace(job, deadline_s=left_s)), silence_s)) as events:
                async for event in events:
                    was_accepted = True
                    if isinstance(event, Refused) and event.reason in _TRY_ANOTHER:
                        if num_deaths:
                            pause_s = _LONGEST_PAUSE_S
                            break
                        if event.reason not in tried_another:
                            tried_another.add(event.reason)
                            pause_s = 0.0
                            break
                        if event.reason == "queue_full" and saturated_workers is not None:
                            saturated_workers.record(job, event)
                    if event is not None and delivered.is_new(event):
                        yield event
                    if isinstance(event, Finished | Refused):
                        return
                else:
                    raise WorkerLost("its events stopped")
        except WorkerLost as lost:
            _log.warning("job %s lost its worker: %s", job.request_id, lost)
            num_deaths += was_accepted
            if num_deaths >= MAX_DEATHS:
                yield Refused("failed", f"{num_deaths} workers died while running it")
                return
            if was_accepted:
                on_rerun()
        await asyncio.sleep(min(pause_s, max(0.0, ends_at - loop.time())))


@dataclass
class _Delivered:
    """Events that the client has received."""

    partials: set[tuple[int, int]] = field(default_factory=set)  # candidate, partial_index
    tokens_generated: int = -1

    def is_new(self, event: GenerationEvent) -> bool:
        if isinstance(event, Partial):
            number = (event.candidate, event.partial_index)
            is_new = number not in self.partials
            self.partials.add(number)
            return is_new
        if isinstance(event, Progress):
            is_new = event.tokens_generated > self.tokens_generated
            self.tokens_generated = max(self.tokens_generated, event.tokens_generated)
            return is_new
        return True


async def _until_silent(
    events: AsyncGenerator[GenerationEvent | None, None], silence_s: float
) -> AsyncGenerator[GenerationEvent | None, None]:
    """Passes events through; raises WorkerLost after `silence_s` seconds without one."""
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise WorkerLost(f"silent for {silence_s:g} s") from None
            yield event


async def with_heartbeats(
    events: AsyncIterator[GenerationEvent], *, heartbeat_s: float = HEARTBEAT_S
) -> AsyncGenerator[GenerationEvent | None, None]:
    """A worker's events in the form of `Send`: None at once, and after every `heartbeat_s` seconds without an event."""
    yield None
    pending: asyncio.Future[GenerationEvent] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=heartbeat_s)
            if not done:
                yield None
                continue
            arrived, pending = pending, None
            try:
                event = arrived.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
        if isinstance(events, AsyncGenerator):
            await events.aclose()
