import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from serve.api import listener, middleware
from serve.api.application import build_api
from serve.api.keys import add_key
from serve.settings import ServeSettings
from tests.live_server import (
    ScriptedPool,
    ask,
    exchange,
    finished,
    post_json,
    read_reply,
    request_bytes,
    serving,
)

GENERATE = "/v1/images/generations"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT_S", 0.3)
    with serving(build_api(ScriptedPool(), ServeSettings(page=False))) as port:
        yield port


@pytest.mark.parametrize(
    "request_",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,  # a TLS client
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\na",
        b"GET / HTTP/1.1\r\na: b\r\n" + b"c: d\r\n" * 5000 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 17_000,  # an endless header
    ],
    ids=range(10),
)
def test_malformed_http_and_large_heads_are_400_with_the_error_object(port: int, request_: bytes) -> None:
    reply = exchange(port, request_)
    assert (reply.status, reply.error["code"]) == (400, "http_error")
    assert ask(port, "GET", "/healthz").status == 200


def test_a_head_of_almost_16_kib_is_read(port: int) -> None:
    assert ask(port, "GET", "/healthz", headers={"x-long": "a" * 15_000}).status == 200


@pytest.mark.slow
def test_an_incomplete_head_times_out(port: int) -> None:
    for sent in (b"", b"GET /healthz HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b"", "closed by the server"


def _read_health(connection: socket.socket) -> None:
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        part = connection.recv(65536)
        assert part, "the server closed the connection"
        received += part


def test_a_connection_is_reused_and_its_next_head_times_out_too(port: int) -> None:
    request = request_bytes("GET", "/healthz", port=port, headers={"connection": ""})
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request)
            _read_health(connection)
        connection.sendall(request[:-4])
        assert connection.recv(100) == b"", "closed by the server"


def test_bytes_after_the_body_end_the_connection_and_not_the_response(port: int) -> None:
    request = request_bytes("POST", GENERATE, body=b'{"prompt": "a"}', port=port, headers={"connection": ""})
    reply = exchange(port, request + b"\0\0 and more than was declared")
    assert reply.status == 200
    assert reply.headers["connection"] == "close"


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    first = request_bytes("POST", GENERATE, body=b'{"prompt": "a", "seed": 1}', port=port, headers={"connection": ""})
    second = request_bytes("POST", GENERATE, body=b'{"prompt": "a", "seed": 2}', port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(first + second)
        body = read_reply(connection).body
    assert body.index(b'"seed": 1') < body.index(b'"seed": 2')


def test_a_connection_queues_few_requests_and_answers_those(port: int) -> None:
    """1,300 fit into one read, and each takes 3 KB: 600 connections once took 160 MB for 2.4 MB sent."""
    request = request_bytes("GET", "/healthz", port=port, headers={"connection": ""})
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request * 200)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200") == 1 + listener.MAX_PIPELINED


def test_no_websocket_is_opened(port: int) -> None:
    headers = {
        "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    request = request_bytes("GET", "/nowhere", port=port, headers=headers)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")


def test_the_server_header_is_not_sent(port: int) -> None:
    assert "server" not in ask(port, "GET", "/healthz").headers


def test_it_is_not_sent_where_uvicorn_has_its_default_either() -> None:
    """By Ray's proxy, which has no setting for it: uvicorn's default."""
    state = ServerState()
    state.default_headers = [(b"date", b"today"), (b"server", b"uvicorn")]
    protocol, _ = new_protocol(state=state)
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert protocol.cycle.default_headers == [(b"date", b"today")]


def test_stock_uvicorn_reads_a_head_of_any_size() -> None:
    """The reason for the limits: without them the same head is read."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    server = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", log_config=None))

    async def run() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving_task = asyncio.create_task(server.serve([listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000 + b"\r\n")
            line = await reader.readline()
            writer.close()
            server.should_exit = True
            await serving_task
            return line

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200")


def test_a_stopping_server_finishes_open_requests() -> None:
    async def slow(job: Any) -> Any:
        await asyncio.sleep(0.5)
        yield finished(job)

    pool = ScriptedPool(slow)
    replies = []
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        sender = threading.Thread(target=lambda: replies.append(post_json(port, GENERATE, {"prompt": "a"})))
        sender.start()
        while not pool.num_open:
            time.sleep(0.01)
    sender.join()
    assert [reply.status for reply in replies] == [200]


# ------------------------------------------------------------------------------------- bodies that do not end as declared

CHUNKED = {"transfer-encoding": "chunked", "content-length": "", "connection": ""}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Port and key of a server with keys."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key = add_key(path, "shop", scopes=["generate"])
    with serving(build_api(ScriptedPool(), ServeSettings(page=False, keys_file=str(path)))) as port:
        yield port, key


def chunked(port: int, *, headers: dict[str, str] | None = None, size: bytes = b"f", tail: bytes) -> bytes:
    """A request whose chunk of JSON is followed by `tail`."""
    head = request_bytes("POST", GENERATE, port=port, headers=CHUNKED | (headers or {}))
    return head + size + b'\r\n{"prompt": "a"}\r\n' + tail


def test_a_trailer_is_no_header(keyed: tuple[int, str]) -> None:
    port, key = keyed
    trailer = f"0\r\nauthorization: Bearer {key}\r\n\r\n".encode()
    reply = exchange(port, chunked(port, headers={"connection": "close"}, tail=trailer))
    assert (reply.status, reply.error["code"]) == (401, "missing_api_key")
    # in pieces, so that the handler has its headers before the trailer arrives
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for byte in chunked(port, headers={"connection": "close"}, tail=trailer):
            connection.send(bytes([byte]))
        assert read_reply(connection).status == 401


def test_a_small_trailer_changes_nothing(keyed: tuple[int, str]) -> None:
    port, key = keyed
    headers = {"authorization": f"Bearer {key}", "connection": "close"}
    tail = b"0\r\nx-checksum: 1\r\n\r\n"
    assert exchange(port, chunked(port, headers=headers, tail=tail)).status == 200


@pytest.mark.parametrize(
    ("size", "tail"),
    [
        (b"f", b"0\r\n" + b"a: b\r\n" * 50_000),  # trailers
        (b"f", b"0\r\na: " + b"b" * 2**20),  # one, without an end
        (b"f;" + b"x" * 2**20, b"0\r\n\r\n"),  # a chunk extension
        (b"f", b"zz\r\n"),  # no chunk
        (b"zz", b""),
        (b"f", b"0\r\na b\r\n"),  # no trailer
    ],
    ids=range(6),
)
@pytest.mark.parametrize("with_key", [True, False])
def test_a_malformed_body_ends_its_request_at_once(
    keyed: tuple[int, str], size: bytes, tail: bytes, with_key: bool
) -> None:
    """Nothing waits for the rest of it: the body's limit of 30 s is not reached."""
    port, key = keyed
    headers = {"authorization": f"Bearer {key}"} if with_key else {}
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, suppress(ConnectionError):
        connection.settimeout(20)
        connection.sendall(chunked(port, headers=headers, size=size, tail=tail))
        reply = read_reply(connection)
        assert reply.status == (400 if with_key else reply.status)
        assert reply.status in (400, 401)


def test_the_parser_keeps_no_more_of_a_trailer_than_one_read(port: int) -> None:
    """A refused request, too, whose client goes on: bytes after the limit are not handed to the parser."""
    fed: list[int] = []

    class Counting(listener.BoundedHttp):
        def data_received(self, data: bytes) -> None:
            if not self._is_broken:
                fed.append(len(data))
            super().data_received(data)

    protocol, transport = new_protocol(Counting)
    protocol.data_received(chunked(80, tail=b"0\r\na: "))
    for _ in range(1000):
        protocol.data_received(b"b" * 65536)
    assert sum(fed) < 200_000
    assert b"400 Bad Request" in transport.written


def test_a_refused_client_that_drips_its_body_is_closed(
    keyed: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_LINGER_S", 0.1)
    monkeypatch.setattr(listener, "_LINGER_S", 0.1)
    port, _ = keyed
    head = request_bytes("POST", GENERATE, port=port, headers={"content-length": "1000", "connection": ""})
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + b"{")
        assert read_reply(connection).status == 401, "and the end, well before the body"


def test_empty_lines_after_a_reply_keep_no_connection(port: int) -> None:
    request = request_bytes("GET", "/healthz", port=port, headers={"connection": ""})
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        _read_health(connection)
        connection.sendall(b"\r\n")
        assert connection.recv(100) == b"", "closed by the server"


# ---------------------------------------------------------------------------------------------- connections and their ends


class Transport(asyncio.Transport):
    """A transport whose peer reads `num_read` bytes."""

    def __init__(self, peer: str) -> None:
        super().__init__({"peername": (peer, 1), "sockname": ("127.0.0.1", 80)})
        self.written, self.num_read, self.is_aborted, self.is_closed = b"", 0, False, False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return len(self.written) - self.num_read

    def write_eof(self) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = self.is_closed = True


class Loop:
    """An event loop's clock and timers, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Any] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Any, *_: Any) -> Any:
        timer: Any = Mock(at=self.now + delay, call=call, cancel=lambda: self._cancel(timer))
        self.timers.append(timer)
        return timer

    def _cancel(self, timer: Any) -> None:
        self.timers = [one for one in self.timers if one is not timer]

    def create_task(self, coroutine: Any, **_: Any) -> Any:
        coroutine.close()  # no application runs
        return Mock()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer in [one for one in self.timers if one.at <= self.now]:
            self.timers.remove(timer)
            timer.call()


def new_protocol(
    kind: type[listener.BoundedHttp] = listener.BoundedHttp,
    *,
    state: ServerState | None = None,
    loop: Loop | None = None,
    peer: str = "10.0.0.1",
) -> tuple[Any, Transport]:
    """A protocol on a connection of `peer`, outside any server."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    config = uvicorn.Config(app, http=kind, ws="none", lifespan="off", log_config=None)
    protocol = kind(config, state or ServerState(), {}, loop or Loop())  # type: ignore[arg-type]
    transport = Transport(peer)
    protocol.connection_made(transport)
    return protocol, transport


def test_half_open_heads_make_room_for_new_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,100 of one client once took all descriptors, and every other client was reset."""
    monkeypatch.setattr(listener, "max_connections", lambda: 100)
    state, loop = ServerState(), Loop()
    attackers: list[Transport] = []
    open_ones: list[tuple[Any, Transport]] = []
    for _ in range(1100):
        loop.now += 0.001
        protocol, transport = new_protocol(state=state, loop=loop, peer="10.0.0.6")
        protocol.data_received(b"GET / HT")
        attackers.append(transport)
        open_ones.append((protocol, transport))
        for one in [one for one in open_ones if one[1].is_aborted]:
            open_ones.remove(one)
            one[0].connection_lost(None)
    assert sum(not one.is_closed for one in attackers) == 50, "half of the connections at most, the newest"
    assert not any(one.is_closed for one in attackers[-50:])
    _, other = new_protocol(state=state, loop=loop, peer="10.0.0.7")
    assert (other.is_closed, other.written) == (False, b"")


def test_connections_with_a_request_are_never_closed_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "max_connections", lambda: 10)
    state, loop = ServerState(), Loop()
    for number in range(10):
        protocol, transport = new_protocol(state=state, loop=loop, peer=f"10.0.0.{number}")
        protocol.data_received(request_bytes("GET", "/healthz", headers={"connection": ""}))
        assert not protocol._is_idle
    _, refused = new_protocol(state=state, loop=loop, peer="10.0.1.1")
    assert b"503 Service Unavailable" in refused.written
    assert b"retry-after: 1" in refused.written.lower()
    loop.advance(listener._LINGER_S)
    assert (refused.is_closed, transport.is_closed) == (True, False)
    for number in range(100):
        _, refused = new_protocol(state=state, loop=loop, peer=f"10.0.2.{number}")
    assert (refused.is_aborted, refused.written) == (True, b""), "a flood gets no replies"


@pytest.mark.parametrize(("read_bytes", "is_aborted"), [(0, True), (1000, True), (20_000, False)])
def test_a_reply_that_is_not_read_ends_with_its_connection(read_bytes: int, is_aborted: bool) -> None:
    loop = Loop()
    protocol, transport = new_protocol(loop=loop)
    protocol.data_received(request_bytes("GET", "/healthz", headers={"connection": ""}))
    loop.advance(0)
    transport.written = b"x" * 200_000
    protocol.pause_writing()
    for _ in range(3):
        transport.num_read += read_bytes
        loop.advance(listener.WRITE_TIMEOUT_S)
    assert transport.is_aborted is is_aborted


def test_a_reply_that_is_read_all_is_no_slow_one() -> None:
    """Also where another reply has become unread at the moment of the check."""
    loop = Loop()
    protocol, transport = new_protocol(loop=loop)
    protocol._progress = lambda: (transport.num_read, len(transport.written) - transport.num_read)
    transport.written = b"x" * 100
    protocol.pause_writing()
    for _ in range(5):
        transport.num_read = len(transport.written)
        transport.written += b"x" * 100
        loop.advance(listener.WRITE_TIMEOUT_S)
    assert not transport.is_aborted
    loop.advance(listener.WRITE_TIMEOUT_S)
    assert transport.is_aborted


def test_every_request_of_a_lost_connection_learns_of_it() -> None:
    """Only the latest did: the one before it went on writing, with a traceback for each."""
    protocol, _ = new_protocol()
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 3)
    answered, latest = protocol._running, protocol.cycle
    assert answered is not latest
    protocol.connection_lost(None)
    assert answered.disconnected
    assert latest.disconnected
    assert not protocol.pipeline


def test_a_closing_connection_whose_client_does_not_read_is_aborted() -> None:
    loop = Loop()
    protocol, transport = new_protocol(loop=loop)
    protocol.data_received(b"garbage\r\n\r\n")
    assert transport.written
    loop.advance(listener._LINGER_S)
    assert (transport.is_closed, transport.is_aborted) == (True, False)
    loop.advance(listener.WRITE_TIMEOUT_S)
    assert transport.is_aborted


def test_the_limit_follows_the_limit_on_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(listener.resource, "getrlimit", lambda _: (1024, 1024))
    monkeypatch.setattr(listener.resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert listener.max_connections.__wrapped__() == 512
    monkeypatch.setattr(listener.resource, "getrlimit", lambda _: (1024, 2**20))
    assert listener.max_connections.__wrapped__() == listener.MAX_CONNECTIONS
    assert raised[-1] == (4000, 2**20)


def test_a_pipelined_request_waits_until_the_replies_before_it_are_sent() -> None:
    """With Ray each waiting reply is a copy: 600 clients that read nothing held 62 MB in its proxy."""
    protocol, transport = new_protocol()
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 3)
    first = protocol._running
    protocol.pause_writing()
    first.response_complete = True
    protocol.on_response_complete()
    assert protocol._running is first
    protocol.resume_writing()
    second = protocol._running
    assert second is not first
    second.response_complete = True
    protocol.on_response_complete()
    assert protocol._running is protocol.cycle, "at once, where nothing waits"
    transport.close()


def test_a_pipelined_request_of_a_lost_connection_is_not_started() -> None:
    protocol, _ = new_protocol()
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 2)
    first = protocol._running
    protocol.pause_writing()
    first.response_complete = True
    protocol.on_response_complete()
    protocol.connection_lost(None)  # uvicorn resumes writing then
    assert protocol._running is first
