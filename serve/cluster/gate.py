"""ASGI middleware that hardens Ray Serve's HTTP proxy; Ray loads it by its import path, outermost.

    client ─► uvicorn ─► gate ─► Ray's proxy ─► an API server replica (serve/api/application.py)

Behaviour of Ray's proxy that is unsafe at a public address, and what the gate does about it:

    control headers        `x-request-timeout-seconds` and `x-request-disconnect-disabled` of any client override the
                           server's own settings, and two more steer routing. They are removed.
    unbounded bodies       the proxy reads a body into memory before an API server has seen a byte. Bodies are cut off at
                           the largest size that an API server reads.
    unbounded heads        in bytes and in time. Both are limited as in serve/api/listener.py.
    plain-text errors      become the error object that every other reply carries.
    /-/routes              lists the deployments to anyone. It is 404; /-/healthz stays for probes.
    errors of its own      carry the CORS headers of the API server's replies, for the same origins.
    slow readers           hold a request of Ray's until the last byte is read. A reply is taken up to `_HELD_BYTES` ahead of its
                           client, so Ray is done with a small one at once.
    a dying API server     its requests become 500. A request without any reply yet is sent to another API server, once:
                           generation may be repeated.

The API server has its own limits and its own deadline and is safe without the gate, which is a second line of defence.

No torch, no ray.
"""

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Collection, MutableMapping
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.cross_origin import CrossOrigin
from serve.api.errors import Failure
from serve.settings import Limits

# Read when the proxy starts: the callback that Ray calls takes no arguments.
MAX_BODY_VARIABLE = "KODALLE_MAX_BODY_BYTES"
ORIGINS_VARIABLE = "KODALLE_ALLOWED_ORIGINS"  # separated by spaces

_STEERING = frozenset(
    ("x_request_timeout_seconds", "x_request_disconnect_disabled", "serve_multiplexed_model_id", "x_session_id")
)
_HELD_BYTES = 64 * 1024
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_API_SERVER_HEADER = (
    b"content-security-policy"  # on every reply of an API server (serve/api/middleware.py), on none of Ray's
)


def middlewares() -> list[Middleware]:
    """Callback of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, called in the proxy before it creates its uvicorn server."""
    # Ray names no protocol to uvicorn, which then uses this table's entry "auto".
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serve.api.listener:BoundedHttp"
    max_bytes = int(os.environ.get(MAX_BODY_VARIABLE, Limits().max_edit_bytes))
    origins = os.environ.get(ORIGINS_VARIABLE, "").split()
    return [Middleware(Gate, max_body_bytes=max_bytes, origins=origins)]


class Gate:
    """ASGI middleware in front of Ray Serve's proxy application."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, origins: Collection[str] = ()) -> None:
        self._app, self._max_body_bytes, self._origins = app, max_body_bytes, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "WebSockets are not supported"})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/-/routes":
            await self._refuse(Failure("not_found"), scope, receive, send)
        elif _declared_bytes(scope) > self._max_body_bytes:
            await self._refuse(Failure("request_too_large"), scope, receive, send)
        else:
            await self._forward({**scope, "headers": _safe_headers(scope["headers"])}, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._max_body_bytes)
        for is_last_attempt in (False, True):
            async with _sent_behind(send) as take:
                reply = _Reply(take, body)
                await self._app(_scope_copy(scope), body.from_start(), reply)
            if reply.is_started or body.is_gone:
                return
            if body.is_too_large:
                await self._refuse(Failure("request_too_large"), scope, receive, send)
                return
            # Ray sends no reply at all for a replica that died, which uvicorn would turn into a plain 500.
            status = reply.withheld_status or 500
            if status != 500 or is_last_attempt:
                await self._refuse(_failure_for(status), scope, receive, send)
                return

    async def _refuse(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(_: Scope, __: Receive, send: Send) -> None:
            await _send_failure(failure, send)

        await CrossOrigin(answer, origins=self._origins)(scope, receive, send)


class _Body:
    """A request's body as it arrives, buffered until the reply starts so that the request can be sent a second time."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._kept: list[Message] | None = []
        self._num_bytes = 0
        self.is_too_large = self.is_gone = False

    def from_start(self) -> Receive:
        kept = list(self._kept or ())
        kept.reverse()

        async def receive() -> Message:
            return kept.pop() if kept else await self._next()

        return receive

    def forget(self) -> None:
        self._kept = None

    async def _next(self) -> Message:
        if self.is_too_large:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_gone = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            self.is_too_large = True
            self.forget()
            return {"type": "http.disconnect"}
        if self._kept is not None:
            self._kept.append(message)
        return message


@contextlib.asynccontextmanager
async def _sent_behind(send: Send) -> AsyncIterator[Send]:
    """A `send` that does not wait for its client, up to `_HELD_BYTES`; the block ends when all is sent."""
    waiting: deque[Message] = deque()
    held_bytes, is_over = 0, False
    changed = asyncio.Condition()

    async def write() -> None:
        nonlocal held_bytes
        while True:
            async with changed:
                await changed.wait_for(lambda: waiting or is_over)
                if not waiting:
                    return
                message = waiting.popleft()
            try:
                await send(message)
            finally:
                async with changed:
                    held_bytes -= len(message.get("body", b""))
                    changed.notify_all()

    async def take(message: Message) -> None:
        nonlocal held_bytes
        async with changed:
            await changed.wait_for(lambda: held_bytes < _HELD_BYTES or writer.done())
            held_bytes += len(message.get("body", b""))
            waiting.append(message)
            changed.notify_all()

    writer = asyncio.create_task(write())
    try:
        yield take
        async with changed:
            is_over = True
            changed.notify_all()
        await writer
    finally:
        writer.cancel()


class _Reply:
    """Forwards an API server's reply, and withholds one of Ray's own, of which only the status is kept."""

    def __init__(self, send: Send, body: _Body) -> None:
        self._send, self._body = send, body
        self.is_started = False
        self.withheld_status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message["headers"]]
            if message["status"] >= 400 and _API_SERVER_HEADER not in names:
                self.withheld_status = message["status"]
                return
            message = {**message, "headers": _one_request_id(message["headers"])}
            self.is_started = True
            self._body.forget()
        if self.withheld_status or (self._body.is_too_large and not self.is_started):
            return
        await self._send(message)


def _scope_copy(scope: Scope) -> Scope:
    """A copy for one attempt: what the layers below write into it must not leak into a second attempt."""
    return {**scope, "headers": list(scope["headers"]), "state": dict(scope.get("state", {}))}


def _safe_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without Ray's control headers, and without a request id that is unfit for a log."""
    return [
        (name, value)
        for name, value in headers
        if name.lower().replace(b"-", b"_").decode("latin-1") not in _STEERING
        and (name.lower() != b"x-request-id" or _REQUEST_ID.fullmatch(value))
    ]


def _one_request_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers with the first request id only: Ray appends its own to the API server's."""
    kept: MutableMapping[bytes, tuple[bytes, bytes]] = {}
    others = []
    for name, value in headers:
        if name.lower() == b"x-request-id":
            kept.setdefault(b"x-request-id", (name, value))
        else:
            others.append((name, value))
    return [*others, *kept.values()]


def _declared_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _failure_for(status: int) -> Failure:
    """One of Ray's own errors as our error object."""
    if status == 429:
        return Failure("queue_full", retry_after_s=1)
    if status in (404, 503):  # no route yet, or not any more; no API server accepts requests
        return Failure("unavailable", retry_after_s=1)
    if status == 408:
        return Failure("deadline_exceeded")
    return Failure("generation_failed", "The process that was answering died.", "응답하던 프로세스가 종료되었습니다.")


async def _send_failure(failure: Failure, send: Send) -> None:
    body = failure.body()
    headers: dict[str, Any] = failure.headers | {"content-length": str(len(body))}
    if failure.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    raw = [(name.encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
