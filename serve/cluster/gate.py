"""What stands in Ray Serve's HTTP proxy before everything else: ASGI middleware that Ray loads by its import path.

    client ─► uvicorn ─► gate ─► Ray's proxy ─► an edge replica (serve/api/application.py)

Ray's proxy has habits that a public address cannot afford, and this takes them away:

    headers with power     `x-request-timeout-seconds` and `x-request-disconnect-disabled` of any client override the
                           server's own; two more steer routing. They are taken off.
    a body of any size     the proxy reads it into memory before an edge has seen a byte. It ends at the largest body
                           that the edge reads.
    a head of any size     and for any time. Both end where serve/api/listener.py ends them.
    errors as plain text   become the error object that every other reply carries.
    /-/routes              tells anyone what is deployed. It is gone; /-/healthz stays for probes.
    an edge that dies      its requests become 500. They are sent to another edge, once, where nothing was answered yet:
                           a drawing may be repeated.

The edge keeps its own limits and its own deadline: it is safe without this, and this is the second net.

No torch, no ray.
"""

import os
import re
from collections.abc import MutableMapping
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import Failure
from serve.settings import Limits

# Read where the proxy starts: the callback that Ray calls takes no arguments.
MAX_BODY_VARIABLE = "KODALLE_MAX_BODY_BYTES"

_STEERING = frozenset(
    ("x_request_timeout_seconds", "x_request_disconnect_disabled", "serve_multiplexed_model_id", "x_session_id")
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OURS = b"content-security-policy"  # on every reply of an edge (serve/api/middleware.py), on none of Ray's


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: called in the proxy, before it makes its uvicorn server."""
    # Ray gives uvicorn no protocol, so that it takes what this table calls "auto".
    uvicorn.config.HTTP_PROTOCOLS["auto"] = "serve.api.listener:BoundedHttp"
    max_bytes = int(os.environ.get(MAX_BODY_VARIABLE, Limits().max_edit_bytes))
    return [Middleware(Gate, max_body_bytes=max_bytes)]


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSockets here"})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/-/routes":
            await _send_failure(Failure("not_found"), send)
        elif _declared_bytes(scope) > self._max_body_bytes:
            await _send_failure(Failure("request_too_large"), send)
        else:
            await self._pass_on({**scope, "headers": _harmless(scope["headers"])}, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._max_body_bytes)
        for is_last in (False, True):
            reply = _Reply(send, body)
            await self._app(_own_copy(scope), body.from_start(), reply)
            if reply.is_begun or body.is_gone:
                return
            if body.is_too_large:
                await _send_failure(Failure("request_too_large"), send)
                return
            # Of a replica that died Ray says nothing at all, which uvicorn would make a plain 500.
            status = reply.withheld_status or 500
            if status != 500 or is_last:
                await _send_failure(_failure_for(status), send)
                return


class _Body:
    """A request's body as it comes, kept until the reply begins so that it can be sent once more."""

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


class _Reply:
    """Passes an edge's reply on and withholds one of Ray's own, of which only the status is kept."""

    def __init__(self, send: Send, body: _Body) -> None:
        self._send, self._body = send, body
        self.is_begun = False
        self.withheld_status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message["headers"]]
            if message["status"] >= 400 and _OURS not in names:
                self.withheld_status = message["status"]
                return
            message = {**message, "headers": _one_request_id(message["headers"])}
            self.is_begun = True
            self._body.forget()
        if self.withheld_status or (self._body.is_too_large and not self.is_begun):
            return
        await self._send(message)


def _own_copy(scope: Scope) -> Scope:
    """What the layers below write into a scope must not be found by a second attempt."""
    return {**scope, "headers": list(scope["headers"]), "state": dict(scope.get("state", {}))}


def _harmless(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without those that steer Ray, and without a request id that does not belong into a log."""
    return [
        (name, value)
        for name, value in headers
        if name.lower().replace(b"-", b"_").decode("latin-1") not in _STEERING
        and (name.lower() != b"x-request-id" or _REQUEST_ID.fullmatch(value))
    ]


def _one_request_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Ray adds its own behind the edge's."""
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
    """One of Ray's own errors, told as ours."""
    if status == 429:
        return Failure("queue_full", retry_after_s=1)
    if status in (404, 503):  # no route yet, or not any more; no edge takes requests
        return Failure("unavailable", retry_after_s=1)
    if status == 408:
        return Failure("deadline_exceeded")
    return Failure("drawing_failed", "The process that answered it died.", "응답하던 프로세스가 종료되었습니다.")


async def _send_failure(failure: Failure, send: Send) -> None:
    body = failure.body()
    headers: dict[str, Any] = failure.headers | {"content-length": str(len(body))}
    if failure.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    raw = [(name.encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
