"""Draws a job although its worker dies: the same job is sent again, and what was already told is not told twice.

A job decides its pictures before it is sent (seed, settings, given pixels), so another worker makes the same bytes and
a client sees nothing but a pause. Ray Serve itself never repeats a request that was sent.

How a death is noticed:

    the call fails       a killed process: within milliseconds
    silence              a host that was cut off closes no connection. A worker says something every `BEAT_S`, be it only
                         that it lives; after `SILENCE_S` without a word its job is drawn elsewhere. Ray's own health
                         check of a node takes up to a minute.

A job that kills every worker that takes it on is given up after `MAX_DEATHS` of them. What a worker refused stays
refused, but for a worker that is stopping or full: one other is asked. And where a worker that had taken the job on died,
the others' queues being full is no refusal any more: it is sent until one of them has room, or its time is over.

No torch, no ray.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from serve.cluster.saturated_workers import SaturatedWorkers
from serve.messages import Finished, GenerationEvent, GenerationJob, Partial, Progress, Refused

BEAT_S = 1.0
SILENCE_S = 5.0
MAX_DEATHS = 3
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 0.5
_ASK_ANOTHER = ("draining", "queue_full")

_log = logging.getLogger(__name__)

# Sends a job to some worker. Its first item, None, says that the job was taken on; later ones, that the worker lives.
Send = Callable[[GenerationJob], AsyncGenerator[GenerationEvent | None, None]]


class WorkerLost(Exception):
    """The worker of a job died, or is out of reach; raised by `Send`."""


async def generate_with_reruns(
    send: Send,
    job: GenerationJob,
    *,
    on_rerun: Callable[[], None],
    saturated_workers: SaturatedWorkers | None = None,
    silence_s: float = SILENCE_S,
) -> AsyncIterator[GenerationEvent]:
    """The job's events, each once, whichever workers they come from; the last is `Finished` or `Refused`.

    Args:
        on_rerun: called whenever a job that a worker had taken on is sent again.
        saturated_workers: what the edge remembers of refusals; None: every worker is asked about every job.
    """
    if saturated_workers is not None and (refusal := saturated_workers.refusal(job)) is not None:
        yield refusal
        return
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + job.deadline_s
    told = _Told()
    asked_another: set[str] = set()
    num_deaths = 0
    while True:
        left_s = ends_at - loop.time()
        if left_s <= 0:
            yield Refused("deadline")
            return
        was_taken_on, pause_s = False, _PAUSE_S
        try:
            async with aclosing(_heard(send(replace(job, deadline_s=left_s)), silence_s)) as events:
                async for event in events:
                    was_taken_on = True
                    if isinstance(event, Refused) and event.reason in _ASK_ANOTHER:
                        if num_deaths:
                            pause_s = _LONGEST_PAUSE_S
                            break
                        if event.reason not in asked_another:
                            asked_another.add(event.reason)
                            pause_s = 0.0
                            break
                        if event.reason == "queue_full" and saturated_workers is not None:
                            saturated_workers.note(job, event)
                    if event is not None and told.is_news(event):
                        yield event
                    if isinstance(event, Finished | Refused):
                        return
                else:
                    raise WorkerLost("its events stopped")
        except WorkerLost as lost:
            _log.warning("job %s lost its worker: %s", job.request_id, lost)
            num_deaths += was_taken_on
            if num_deaths >= MAX_DEATHS:
                yield Refused("failed", f"{num_deaths} workers died of it")
                return
            if was_taken_on:
                on_rerun()
        await asyncio.sleep(min(pause_s, max(0.0, ends_at - loop.time())))


@dataclass
class _Told:
    """What the client has been told already."""

    partials: set[tuple[int, int]] = field(default_factory=set)  # candidate, partial_index
    tokens_generated: int = -1

    def is_news(self, event: GenerationEvent) -> bool:
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


async def _heard(
    events: AsyncGenerator[GenerationEvent | None, None], silence_s: float
) -> AsyncGenerator[GenerationEvent | None, None]:
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise WorkerLost(f"not a word for {silence_s:g} s") from None
            yield event


async def with_beats(
    events: AsyncIterator[GenerationEvent], *, beat_s: float = BEAT_S
) -> AsyncGenerator[GenerationEvent | None, None]:
    """A worker's events as `Send` gives them: None at once, and whenever `beat_s` seconds went by without one."""
    yield None
    coming: asyncio.Future[GenerationEvent] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=beat_s)
            if not done:
                yield None
                continue
            arrived, coming = coming, None
            try:
                event = arrived.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        if isinstance(events, AsyncGenerator):
            await events.aclose()
