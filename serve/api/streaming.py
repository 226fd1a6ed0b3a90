"""Listens to a worker and to the client at the same time, and writes server-sent events.

A client that hangs up is noticed here, by waiting for `http.disconnect` beside the worker's next event, and its drawing
is cancelled. The server underneath is not relied on for that: under Ray Serve the header
`x-request-disconnect-disabled` of any client switches its own cancelling off. The deadline is kept here for the same
reason.

A stream's status line is sent with its first event, so that a job that is refused at once gets its proper status; or
after `KEEP_ALIVE_S` without an event, with the first comment line that keeps proxies from closing a silent connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Scope, Send

from serve.api import responses as answers
from serve.api.body import ClientGone, Receive
from serve.api.errors import Failure, refusal
from serve.api.responses import AnswerStyle
from serve.messages import Finished, GenerationEvent, GenerationJob, Partial, Progress, Queued, Refused
from serve.pool import WorkerPool

KEEP_ALIVE_S = 10.0
_KEEP_ALIVE = b": keep-alive\n\n"
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold events back until its buffer is full
}
_log = logging.getLogger(__name__)

OnFinished = Callable[[Finished], None]
OnFailure = Callable[[Failure], None]


async def drawn_events(
    pool: WorkerPool, job: GenerationJob, *, receive: Receive, ends_at: float, keep_alive_s: float | None = None
) -> AsyncGenerator[GenerationEvent | None, None]:
    """The job's events up to `Finished`; None whenever `keep_alive_s` seconds went by without one.

    However it ends, the drawing is cancelled or over when the generator is closed: use it inside
    `contextlib.aclosing`.

    Args:
        receive: of the request, its body read: nothing but `http.disconnect` comes any more.
        ends_at: the event loop's time by which the last byte must be out.

    Raises:
        Failure: the worker refused, or the time is over.
        ClientGone: the client hung up.
    """
    loop = asyncio.get_running_loop()
    events = aiter(pool.draw(job))
    gone = asyncio.create_task(_hung_up(receive))
    coming: asyncio.Future[GenerationEvent] | None = None
    try:
        while True:
            left_s = ends_at - loop.time()
            if left_s <= 0:
                raise Failure("deadline_exceeded")
            if coming is None:
                coming = asyncio.ensure_future(anext(events))
            either: set[asyncio.Future[Any]] = {gone, coming}
            wait_s = left_s if keep_alive_s is None else min(left_s, keep_alive_s)
            await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            if coming.done():
                event = _next_of(coming)
                coming = None
                yield event
                if isinstance(event, Finished):
                    return
            elif wait_s < left_s:
                yield None
    finally:
        await _stop(gone)
        if coming is not None:
            await _stop(coming)
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def finished_job(pool: WorkerPool, job: GenerationJob, *, receive: Receive, ends_at: float) -> Finished:
    """The job's pictures; raises as `drawn_events` does."""
    async with contextlib.aclosing(drawn_events(pool, job, receive=receive, ends_at=ends_at)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise Failure("drawing_failed", "The worker stopped without a picture.", "그림 없이 끝났습니다.")


class EventStream(Response):
    """A streamed answer. Not Starlette's, whose own watch for a hang-up would compete for the same message."""

    def __init__(
        self,
        pool: WorkerPool,
        job: GenerationJob,
        style: AnswerStyle,
        *,
        ends_at: float,
        on_finished: OnFinished,
        on_failure: OnFailure,
    ) -> None:
        super().__init__(status_code=200, headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._pool, self._job, self._style = pool, job, style
        self._ends_at, self._on_finished, self._on_failure = ends_at, on_finished, on_failure
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A client that does not read stops us in send: the deadline is its limit, too.
            async with asyncio.timeout_at(self._ends_at + 1):
                await self._send_events(receive, send)
        except TimeoutError:
            raise ClientGone from None
        except Failure as failure:
            if not self._started:
                raise
            await self._send_error(send, failure)
        except ClientGone:
            raise
        except Exception:
            if not self._started:
                raise
            _log.exception("request %s failed while it was streamed", self._style.request_id)
            await self._send_error(send, Failure("internal_error"))

    async def _send_events(self, receive: Receive, send: Send) -> None:
        stream = drawn_events(self._pool, self._job, receive=receive, ends_at=self._ends_at, keep_alive_s=KEEP_ALIVE_S)
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._on_finished(event)
                for chunk in _as_chunks(event, self._job, self._style):
                    await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _send_error(self, send: Send, failure: Failure) -> None:
        self._on_failure(failure)
        await send({"type": "http.response.body", "body": error_event(failure), "more_body": False})


def error_event(failure: Failure) -> bytes:
    """What ends a stream whose status line is out: OpenAI's client raises its `error`."""
    return answers.sse("error", {"error": failure.as_object()})


def _as_chunks(event: GenerationEvent | None, job: GenerationJob, style: AnswerStyle) -> Iterator[bytes]:
    if event is None:
        yield _KEEP_ALIVE
    elif isinstance(event, Queued):
        yield answers.queued_event(event, style)
    elif isinstance(event, Progress):
        yield answers.progress_event(event, style)
    elif isinstance(event, Partial):
        yield answers.partial_event(event, job, style)
    elif isinstance(event, Finished):
        yield from answers.finished_events(event, job, style)


def _next_of(coming: "asyncio.Future[GenerationEvent]") -> GenerationEvent:
    try:
        event = coming.result()
    except StopAsyncIteration:
        raise Failure("drawing_failed", "The worker stopped without a picture.", "그림 없이 끝났습니다.") from None
    if isinstance(event, Refused):
        raise refusal(event)
    return event


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: "asyncio.Future[Any]") -> None:
    """Cancels it and waits until it is over, so that its drawing is cancelled before the answer goes on."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # asked for, so that asyncio does not report it as overlooked: nobody waits for it any more
