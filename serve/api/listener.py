"""The HTTP server: uvicorn with limits on heads, trailers, connections and slow readers.

uvicorn's faster protocol reads a head of any size for any time, takes the trailers of a chunked body for headers, keeps
every connection, and answers malformed HTTP in plain text. Here

    heads             have at most `MAX_HEAD_BYTES` and `HEAD_TIMEOUT_S`
    trailers          have at most `MAX_HEAD_BYTES` together with chunk extensions, and are dropped: a proxy may have
                      checked the headers alone
    refused bodies    end with their connection, `_LINGER_S` after the reply
    pipelined         requests are at most `MAX_PIPELINED` beside the one that is answered; a read of 256 KiB holds thousands,
                      of 3 KB each
    replies           of which a client neither reads `_MIN_READ_BYTES` nor all that was unread in `WRITE_TIMEOUT_S` end with
                      their connection, also where they are finished and the socket holds what is left
    memory            of unread replies is `_WRITE_BUFFER_BYTES` and one message of a reply here, and what the socket takes: a
                      pipelined request starts once the replies before it are sent
    connections       are at most `max_connections()`, half of them of one address; beyond, the one that has waited
                      longest without a request makes room, and where there is none the new one gets 503
    half-closed       connections (`nc -N`) get their replies. What arrives is the same for a client that has gone: so the
                      beginning that every reply has is sent at once, which the machine of one that has gone resets

and the answer is the usual error object. WebSockets are disabled, and no reply names the server. Ray's proxy uses the same
protocol class (serve/cluster/gate.py).
"""

import asyncio
import fcntl
import functools
import resource
import socket
import struct
import sys
import termios
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.api.errors import Failure
from serve.arguments import KEEP_ALIVE_S

MAX_HEAD_BYTES = 16 * 1024  # the request line and all headers; and all trailers again
HEAD_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
MAX_PIPELINED = 8
MAX_CONNECTIONS = 2000
_MIN_READ_BYTES = 16 * 1024  # that a client takes in WRITE_TIMEOUT_S: 4 kbit/s
_TCPI_STATE, _TCPI_BYTES_ACKED = 0, 120  # the fields' offsets in Linux's struct tcp_info, a uint8 and a uint64
_TCP_CLOSE = 7  # the state of a connection that was reset
_WRITE_BUFFER_BYTES = 8 * 1024  # of a connection, before its replies wait
_SOCKET_UNSENT_BYTES = 32 * 1024
_DESCRIPTORS_A_CONNECTION = 2  # itself, and an upload on disk
_REPLIES_BEYOND = 64  # connections beyond the limit that get a reply at the same time
_LINGER_S = 2.0
_REPLY_BEGINNING = b"HTTP/1.1 "
_RESET_WITHIN_S = 0.02  # when a reset is first looked for; each further look waits twice as long, up to
_RESET_LOOKED_FOR_EACH_S = 1.0


@functools.cache
def max_connections() -> int:
    """Connections at the same time: `MAX_CONNECTIONS`, or as many as the limit on open files (raised if it may be) leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS * _DESCRIPTORS_A_CONNECTION
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    files = wanted if soft == resource.RLIM_INFINITY else soft
    return min(MAX_CONNECTIONS, files // _DESCRIPTORS_A_CONNECTION)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol with the limits of the module's docstring."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = False
    _trailer_bytes = 0  # and those of chunk extensions
    _is_advancing = False  # the parser has found something in the latest bytes
    _write_timer: asyncio.TimerHandle | None = None
    _reset_timer: asyncio.TimerHandle | None = None  # of a half-closed connection
    _read_bytes = 0  # of replies by the client, when the timer was started
    _unread_bytes = 0
    _is_next_waiting = False  # a pipelined request, for the replies before it to be sent
    _running: RequestResponseCycle | None = None  # the request that is answered; `cycle` is the latest that was read
    _is_broken = False  # malformed HTTP was received, or a reply sent early: further bytes are ignored

    # ---------------------------------------------------------------------------------------------------- connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._opened_at = self.loop.time()
        transport.set_write_buffer_limits(_WRITE_BUFFER_BYTES)
        self._socket = transport.get_extra_info("socket") if sys.platform == "linux" else None
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _SOCKET_UNSENT_BYTES)
            # For what is left in the socket of a closed connection, of which nothing here knows any more.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * WRITE_TIMEOUT_S))
        if self._has_room():
            self._start_head_timer()
        elif len(self.connections) > max_connections() + _REPLIES_BEYOND:
            transport.abort()
        else:
            self._reply_and_end(_TOO_MANY_CONNECTIONS)

    def _has_room(self) -> bool:
        """Whether this connection is within the limits, perhaps after the end of one that waits for a request."""
        others = [one for one in self.connections if isinstance(one, BoundedHttp) and one is not self]
        others = [one for one in others if not (one._is_broken and one._is_idle)]  # about to be closed
        same = [one for one in others if one._address == self._address]
        for within, most in ((same, max(1, max_connections() // 2)), (others, max_connections())):
            if len(within) >= most:
                waiting = [one for one in within if one._is_idle and not one.transport.is_closing()]
                if not waiting:
                    return False
                min(waiting, key=lambda one: one._opened_at).transport.abort()
                break
        return True

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        # `listener` configures uvicorn so; Ray's proxy has no setting for it.
        cycle.default_headers = [(name, value) for name, value in cycle.default_headers if name != b"server"]
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        if self._reset_timer is not None:
            self._reset_timer.cancel()
        self._is_next_waiting = False
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            # Uvicorn says so to the latest alone: others would write to what is closed.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: where a complete request is answered, and a reset can be noticed."""
        answered = self._running
        if self._socket is None or answered is None or self._is_idle or self.cycle.more_body or self.cycle.disconnected:
            return False
        if self._reset_timer is None:
            self._stop_head_timer()  # of a next request, which will not be complete
            self.cycle.keep_alive = False
            self._send_beginning(answered)
            self._look_for_reset(_RESET_WITHIN_S)
        return True

    def _send_beginning(self, cycle: RequestResponseCycle) -> None:
        """Sends what comes next whatever the reply says: a machine whose program has gone resets the connection."""
        if not cycle.response_started:
            self.transport.write(_REPLY_BEGINNING)
            cycle.transport = _RestOfReply(self.transport)  # type: ignore[assignment]
        elif cycle.chunked_encoding and not cycle.response_complete:
            self.transport.write(b"0")  # the size of a chunk may begin with zeros

    def _look_for_reset(self, again_in_s: float) -> None:
        """Ends the connection if it was reset: of a half-closed one nothing is read, so the event loop does not notice."""
        assert self._socket is not None
        information = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_STATE + 1)
        if information[_TCPI_STATE] == _TCP_CLOSE:
            self.transport.abort()
            return
        look = functools.partial(self._look_for_reset, min(2 * again_in_s, _RESET_LOOKED_FOR_EACH_S))
        self._reset_timer = self.loop.call_later(again_in_s, look)

    # ------------------------------------------------------------------------------------------- what the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._trailer_bytes = True, 0
        if self._head_timer is None:
            self._start_head_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)
            return
        self._is_advancing = True
        self._trailer_bytes += len(name) + len(value) + 4
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            raise _HeadTooLarge  # the parser reports it as malformed HTTP
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _TooManyPipelined  # those before it are answered, then the connection ends
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._is_advancing = True

    def on_body(self, body: bytes) -> None:
        self._is_advancing = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_advancing = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        self._is_advancing = False
        super().data_received(data)
        if self._is_broken or self.transport.is_closing():
            return
        if self._head_timer is None and self._is_idle and not self._is_in_head:
            self._start_head_timer()  # empty lines, which may precede a request
        if self._head_timer is not None:
            self._head_bytes += len(data)
        elif not self._is_advancing:  # within one trailer or chunk extension, which the parser keeps until its end
            self._trailer_bytes += len(data)
        if max(self._head_bytes, self._trailer_bytes) > MAX_HEAD_BYTES:
            self.send_400_response("")

    # --------------------------------------------------------------------------------------------------------- replies

    def send_400_response(self, msg: str) -> None:
        self._is_broken = True
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or not cycle.more_body:
                cycle.keep_alive = False  # a body longer than declared: its request is answered, later ones are not
                return
            cycle.disconnected = True  # a malformed body: its handler stops waiting for the rest
            cycle.message_event.set()
            if cycle.response_started:
                self._end()
                return
        self._reply_and_end(_NOT_HTTP)

    def on_response_complete(self) -> None:
        if not self.pipeline and self.cycle.more_body and not self.transport.is_closing():
            self.server_state.total_requests += 1
            self._end()  # the rest of a refused body is not read
            return
        if self.pipeline and self.flow.write_paused and not self.transport.is_closing():
            self.server_state.total_requests += 1
            self._is_next_waiting = True  # its reply would wait, too, and Ray's proxy holds one as a copy of its own
        else:
            super().on_response_complete()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_next_waiting:
            self._is_next_waiting = False
            self._start_asgi_task(*self.pipeline.pop())

    def _reply_and_end(self, failure: Failure) -> None:
        body = failure.body()
        line = f"HTTP/1.1 {failure.status} {'Bad Request' if failure.status == 400 else 'Service Unavailable'}\r\n"
        head = f"{line}content-length: {len(body)}\r\nconnection: close\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in failure.headers.items())
        self.transport.write(f"{head}\r\n".encode("ascii") + body)
        self._end()

    def _end(self) -> None:
        """Closes after a delay: when closed at once, bytes in flight would reset the connection and lose the reply."""
        self._is_broken = True
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self._close)

    # ---------------------------------------------------------------------------------------------------------- timers

    def _start_head_timer(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _stop_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._head_timer = None
        self.transport.close()
        self._watch_writes()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writes()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def _watch_writes(self) -> None:
        """Starts the write timer, unless it runs, where bytes of a reply are unread: here or in the socket.

        For all but the two a reply is sent as soon as the socket has taken it, and a client that reads nothing would keep both
        until the keep-alive ends; a transport that closes waits for it without any limit.
        """
        if self._write_timer is not None:
            return
        self._read_bytes, self._unread_bytes = self._progress()
        if self._unread_bytes:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._check_writes)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_writes(self) -> None:
        self._write_timer = None
        now_read, _ = self._progress()
        if now_read - self._read_bytes < min(_MIN_READ_BYTES, self._unread_bytes):
            self.transport.abort()
        else:
            self._watch_writes()

    def _progress(self) -> tuple[int, int]:
        """Bytes of replies that the client's machine has and has not received."""
        unsent = self.transport.get_write_buffer_size()
        if self._socket is None or self._socket.fileno() < 0:
            return -unsent, unsent  # more is written meanwhile only where the transport has little of it
        information = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_BYTES_ACKED + 8)
        (received,) = struct.unpack_from("Q", information, _TCPI_BYTES_ACKED)
        (queued,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4)))
        return received, unsent + queued


class _RestOfReply:
    """The transport of a reply whose beginning has been sent."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._is_first = transport, True
        self.close, self.is_closing = transport.close, transport.is_closing

    def write(self, data: bytes) -> None:
        self._transport.write(data.removeprefix(_REPLY_BEGINNING) if self._is_first else data)
        self._is_first = False


class _HeadTooLarge(Exception):
    pass


class _TooManyPipelined(Exception):
    pass


_NOT_HTTP = Failure(
    "http_error",
    f"It is not HTTP/1.1, or its head or its trailers have more than {MAX_HEAD_BYTES} bytes.",
    "HTTP 형식이 아니거나 헤더가 너무 큽니다.",
)

_TOO_MANY_CONNECTIONS = Failure(
    "unavailable", "Too many connections are open.", "열려 있는 연결이 너무 많습니다.", retry_after_s=1
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
