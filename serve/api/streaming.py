"""A job's events under a deadline and with disconnect detection, and server-sent events.

A disconnected client is detected here, by waiting for `http.disconnect` beside the worker's next event, and its job is
cancelled. The server underneath is not relied on for that: under Ray Serve any client can disable cancellation with the
header `x-request-disconnect-disabled`. The deadline is enforced here for the same reason.

A stream's status line is sent with its first event, so that a job that is refused at once gets its proper status; or
after `KEEP_ALIVE_S` without an event, with the first comment line that keeps proxies from closing a silent connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api import responses
from serve.api.body import ClientGone
from serve.api.errors import Failure, refusal
from serve.api.responses import ResponseContext
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

Answer = TypeVar("Answer")
OnFinished = Callable[[Finished], None]
OnFailure = Callable[[Failure], None]


async def generation_events(
    pool: WorkerPool, job: GenerationJob, *, receive: Receive, ends_at: float, keep_alive_s: float | None = None
) -> AsyncGenerator[GenerationEvent | None, None]:
    """The job's events up to `Finished`; None after every `keep_alive_s` seconds without one.

    When the generator is closed the job is finished or cancelled, however it ended: use it inside `contextlib.aclosing`.

    Args:
        receive: the request's `receive` after its body has been read: only `http.disconnect` is left.
        ends_at: the event loop's time by which the last byte must be sent.

    Raises:
        Failure: the worker refused, or the deadline has passed.
        ClientGone: the client closed the connection.
    """
    loop = asyncio.get_running_loop()
    events = aiter(pool.generate(job))
    gone = asyncio.create_task(_disconnected(receive))
    pending: asyncio.Future[GenerationEvent] | None = None
    try:
        while True:
            left_s = ends_at - loop.time()
            if left_s <= 0:
                raise Failure("deadline_exceeded")
            if pending is None:
                pending = asyncio.ensure_future(anext(events))
            either: set[asyncio.Future[Any]] = {gone, pending}
            wait_s = left_s if keep_alive_s is None else min(left_s, keep_alive_s)
            await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            if pending.done():
                event = _next_of(pending)
                pending = None
                yield event
                if isinstance(event, Finished):
                    return
            elif wait_s < left_s:
                yield None
    finally:
        await _stop(gone)
        if pending is not None:
            await _stop(pending)
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def finished_job(pool: WorkerPool, job: GenerationJob, *, receive: Receive, ends_at: float) -> Finished:
    """The job's last event; raises as `generation_events` does."""
    async with contextlib.aclosing(generation_events(pool, job, receive=receive, ends_at=ends_at)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise Failure("generation_failed", "The worker stopped without a result.", "결과 없이 끝났습니다.")


async def answered(waited: Awaitable[Answer], *, receive: Receive, ends_at: float) -> Answer:
    """What is waited for, which is cancelled at the deadline and when the client closes the connection.

    Raises:
        Failure: the deadline has passed; what `waited` raises.
        ClientGone: the client closed the connection.
    """
    task, gone = asyncio.ensure_future(waited), asyncio.create_task(_disconnected(receive))
    try:
        left_s = ends_at - asyncio.get_running_loop().time()
        await asyncio.wait({task, gone}, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else Failure("deadline_exceeded")
    finally:
        await _stop(gone)
        await _stop(task)


class EventStream(Response):
    """A streamed response. Starlette's own would compete for `http.disconnect`, which it watches for as well."""

    def __init__(
        self,
        pool: WorkerPool,
        job: GenerationJob,
        context: ResponseContext,
        *,
        ends_at: float,
        on_finished: OnFinished,
        on_failure: OnFailure,
    ) -> None:
        super().__init__(status_code=200, headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._pool, self._job, self._context = pool, job, context
        self._ends_at, self._on_finished, self._on_failure = ends_at, on_finished, on_failure
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # `send` blocks while a client does not read: the deadline bounds that, too.
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
            _log.exception("request %s failed while it was streamed", self._context.request_id)
            await self._send_error(send, Failure("internal_error"))

    async def _send_events(self, receive: Receive, send: Send) -> None:
        stream = generation_events(
            self._pool, self._job, receive=receive, ends_at=self._ends_at, keep_alive_s=KEEP_ALIVE_S
        )
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._on_finished(event)
                for chunk in _as_chunks(event, self._job, self._context):
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
    """The last event of a stream that fails after its status line: OpenAI's client raises its `error`."""
    return responses.sse("error", {"error": failure.as_object()})


def _as_chunks(event: GenerationEvent | None, job: GenerationJob, context: ResponseContext) -> Iterator[bytes]:
    if event is None:
        yield _KEEP_ALIVE
    elif isinstance(event, Queued):
        yield responses.queued_event(event, context)
    elif isinstance(event, Progress):
        yield responses.progress_event(event, context)
    elif isinstance(event, Partial):
        yield responses.partial_event(event, job, context)
    elif isinstance(event, Finished):
        yield from responses.finished_events(event, job, context)


def _next_of(pending: "asyncio.Future[GenerationEvent]") -> GenerationEvent:
    try:
        event = pending.result()
    except StopAsyncIteration:
        raise Failure("generation_failed", "The worker stopped without a result.", "결과 없이 끝났습니다.") from None
    if isinstance(event, Refused):
        raise refusal(event)
    return event


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: "asyncio.Future[Any]") -> None:
    """Cancels a task and waits until it has ended, so that its job is cancelled before the response goes on."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not report it as never retrieved
