"""The HTTP server: uvicorn with limits on the head of a request.

uvicorn's faster protocol reads a head of any size for any time, and answers malformed HTTP in plain text. Here a head is
limited to `MAX_HEAD_BYTES` and `HEAD_TIMEOUT_S`, and the answer is the usual error object. WebSockets are disabled. Ray's
proxy uses the same protocol class (serve/cluster/gate.py).
"""

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.errors import Failure
from serve.arguments import KEEP_ALIVE_S

MAX_HEAD_BYTES = 16 * 1024  # the request line and all headers
HEAD_TIMEOUT_S = 10.0
_LINGER_S = 2.0


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol with request heads limited in bytes and in time."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_broken = False  # malformed HTTP was received: further bytes are ignored

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            raise _HeadTooLarge  # the parser reports it as malformed HTTP
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        self._is_broken = True
        self._stop_head_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # a body longer than declared: its request is answered, later ones are not
            return
        body = _NOT_HTTP.body()
        head = f"HTTP/1.1 {_NOT_HTTP.status} Bad Request\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in _NOT_HTTP.headers.items())
        self.transport.write(f"{head}\r\n".encode("ascii") + body)
        # Closed after a delay: when closed at once, bytes in flight would reset the connection and lose the reply.
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self._close)

    def _start_head_timer(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._head_timer = None
        self.transport.close()


class _HeadTooLarge(Exception):
    pass


_NOT_HTTP = Failure(
    "http_error",
    f"It is not HTTP/1.1, or its head has more than {MAX_HEAD_BYTES} bytes.",
    "HTTP 형식이 아니거나 헤더가 너무 큽니다.",
)


def listener(app: ASGIApp, *, host: str, port: int, drain_s: float, keep_alive_s: int = KEEP_ALIVE_S) -> uvicorn.Server:
    """A uvicorn server for `app`; port 0: a free one. serve/api/middleware.py logs requests instead of uvicorn."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedHttp,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any client can send X-Forwarded-For
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=int(drain_s),
        log_config=None,
        log_level="error",  # any client could flood the log: it warns of each malformed request
    )
    return uvicorn.Server(config)
