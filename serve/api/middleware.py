"""The outermost middleware of the HTTP application: request ids, access control, security headers, logging, metrics.

It also turns uncaught exceptions into the error object. Plain ASGI and not one of Starlette's decorated middlewares,
because those hide `http.disconnect` from the handlers.
"""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.access import REJECTED, Caller, admit
from serve.api.body import ClientGone
from serve.api.cross_origin import CrossOrigin
from serve.api.errors import Failure
from serve.api.keys import KeyRing
from serve.metrics import ApiMetrics

# The page's own files, images that it holds in memory, and this server's API; no other origin, nothing inline.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_COUNT = re.compile(r"[0-9]{1,3}")

# How long a refused client may go on sending its body. Closing at once would reset the connection and lose the reply.
_LINGER_S = 2.0

_log = logging.getLogger("serve.requests")


@dataclass
class RequestRecord:
    """A request's data for its log line and metrics. Handlers find it in the scope's state."""

    request_id: str  # the client's, if it sent a valid one
    job_id: str  # the server's own, unique
    arrived_at: float  # the event loop's clock
    method: str
    caller: Caller = REJECTED  # until it is admitted
    status: int = 0
    code: str = ""  # of serve/api/errors.py
    retry_count: int | None = None  # as reported by the client
    details: dict[str, Any] = field(default_factory=dict)  # n, candidates, …: the caption only with `log_prompts`
    is_body_read: bool = True

    def note_failure(self, failure: Failure) -> None:
        self.code = failure.code


class ApiMiddleware:
    """Outermost ASGI middleware of the application.

    Args:
        origins: other origins whose pages may call it.
        root_path: where a proxy publishes it: paths below count as paths, and links stay below.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: ApiMetrics,
        keys: KeyRing | None,
        origins: Collection[str] = (),
        root_path: str = "",
    ) -> None:
        self._app, self._metrics, self._keys, self._origins = app, metrics, keys, origins
        self._root_path = root_path
        self._admitted = CrossOrigin(self._admit, origins=origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "WebSockets are not supported"})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._root_path:
            _place_below(scope, self._root_path)
        _drop_last_slash(scope)
        record = _new_record(scope)
        scope.setdefault("state", {})["record"] = record

        async def receive_tracked() -> Message:
            message = await receive()
            record.is_body_read = not message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if self._origins and "origin" not in headers.get("vary", "").lower():
                    headers.add_vary_header("Origin")
            elif not message.get("more_body", False) and not record.is_body_read:
                await send({**message, "more_body": True})
                await _linger(receive_tracked, record)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._admitted(scope, receive_tracked, send_with_headers)
        finally:
            self._finish(scope, record)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's reply, or that of a failure."""
        record: RequestRecord = scope["state"]["record"]
        try:
            record.caller = admit(scope, get_route_path(scope), self._keys, origins=self._origins)
            await self._app(scope, receive, send)
        except ClientGone:
            self._metrics.cancelled.inc()
            await self._refuse(Failure("client_closed_request"), record, send)
        except Failure as failure:
            await self._refuse(failure, record, send)
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            record.code = "client_closed_request"
            raise
        except Exception:
            # Logs the request id only: a traceback shows no values, and so no caption.
            _log.exception("request %s failed", record.request_id)
            await self._refuse(Failure("internal_error"), record, send)

    async def _refuse(self, failure: Failure, record: RequestRecord, send: Send) -> None:
        record.note_failure(failure)
        if record.status:
            return  # the reply has started: the server closes the connection
        await send_failure(failure, send)

    def _finish(self, scope: Scope, record: RequestRecord) -> None:
        seconds = asyncio.get_running_loop().time() - record.arrived_at
        status = 499 if record.code == "client_closed_request" else record.status
        route = _route(scope)
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if record.code:
            self._metrics.rejected.labels(record.code).inc()
        line = {
            "request_id": record.request_id,
            "job_id": record.job_id,
            "key_id": record.caller.key_id or None,
            "method": record.method,
            "route": route,
            "status": status,
            "code": record.code or None,
            "seconds": round(seconds, 4),
            "retry": record.retry_count,
        }
        _log.info(json.dumps(line | record.details, ensure_ascii=False))


def _place_below(scope: Scope, root_path: str) -> None:
    """Names the root path, and puts it before a path from which the proxy has stripped it: ASGI's paths include it."""
    scope["root_path"] = root_path
    if not scope["path"].startswith(f"{root_path}/"):
        scope["path"] = root_path + scope["path"]


def _drop_last_slash(scope: Scope) -> None:
    """Makes `/v1/models/` and `/v1/models` one path, before access to it is checked; the page's files have no such paths."""
    path = get_route_path(scope)
    if path.endswith("/") and path.strip("/") and not path.startswith("/page/"):
        scope["path"] = scope["path"].rstrip("/")


def _route(scope: Scope) -> str:
    """The path template of the matched route, never the request's own path; `other` without a route."""
    route = scope.get("route")
    if route is None and "app" in scope:  # rejected before it was routed
        routes = (one for one in scope["app"].routes if isinstance(one, Route))
        route = next((one for one in routes if one.matches(scope)[0] is Match.FULL), None)
    return getattr(route, "path", None) or "other"


async def send_failure(failure: Failure, send: Send) -> None:
    """Sends a failure as a complete reply."""
    body = failure.body()
    headers = failure.headers | {"content-length": str(len(body))}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _linger(receive: Receive, record: RequestRecord) -> None:
    """Reads and drops the rest of a client's body."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while not record.is_body_read:
                await receive()


def _new_record(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    job_id = f"req_{secrets.token_hex(12)}"
    client_id = headers.get("x-request-id", "")
    retries = headers.get("x-stainless-retry-count", "")
    return RequestRecord(
        request_id=client_id if _REQUEST_ID.fullmatch(client_id) else job_id,
        job_id=job_id,
        arrived_at=asyncio.get_running_loop().time(),
        method=scope["method"] if scope["method"].isalpha() else "other",
        retry_count=int(retries) if _RETRY_COUNT.fullmatch(retries) else None,
        is_body_read=headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers,
    )
