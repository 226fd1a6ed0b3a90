import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from serve.api import listener
from serve.api.application import build_api
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, exchange, finished, post_json, read_reply, request_bytes, serving

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


def test_a_connection_is_reused_and_its_next_head_times_out_too(port: int) -> None:
    request = request_bytes("GET", "/healthz", port=port, headers={"connection": ""})
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request)
            assert b'{"status":"ok"}' in connection.recv(65536)
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
