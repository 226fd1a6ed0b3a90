"""What listens where there is no Ray: uvicorn, with limits on what comes before a body.

uvicorn's faster protocol takes a head of any size, for as long as a client cares to send it, and answers what is no
HTTP in plain text. Here a head has `MAX_HEAD_BYTES` and `HEAD_TIMEOUT_S`, and the answer has the shape of all others.
WebSockets are switched off: there are none.
"""

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.errors import Failure

MAX_HEAD_BYTES = 16 * 1024  # the request line and all headers
HEAD_TIMEOUT_S = 10.0
_LINGER_S = 2.0
_KEEP_ALIVE_S = 30  # longer than the pause between a person's two requests, shorter than proxies' own limits


class BoundedHttp(HttpToolsProtocol):
    """A connection whose heads are bounded in bytes and in time."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_broken = False  # what comes now is no HTTP any more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            raise _HeadTooLarge  # the parser reports it as a message that is no HTTP
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
        self._end_head()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # a body longer than declared: its request is answered, and then no other
            return
        body = _NOT_HTTP.body()
        head = f"HTTP/1.1 {_NOT_HTTP.status} Bad Request\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in _NOT_HTTP.headers.items())
        self.transport.write(f"{head}\r\n".encode("ascii") + body)
        # Closed a little later: at once, bytes on their way would reset the connection, and the reply would be lost.
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self._give_up)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()


class _HeadTooLarge(Exception):
    pass


_NOT_HTTP = Failure(
    "http_error",
    f"It is no HTTP/1.1, or its head has more than {MAX_HEAD_BYTES} bytes.",
    "HTTP 형식이 아니거나 헤더가 너무 큽니다.",
)


def listener(app: ASGIApp, *, host: str, port: int, drain_s: float) -> uvicorn.Server:
    """A server for `app`; port 0: a free one. Its own access log is off: serve/api/middleware.py writes one line a request."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedHttp,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # X-Forwarded-For is any client's word
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_s),
        log_config=None,
        log_level="error",  # it warns of each request that is no HTTP, at anybody's bidding
    )
    return uvicorn.Server(config)
