"""Clients that end their side of the connection after the request, as `nc -N` and some health checks do: on real sockets."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from serve.api.application import build_api
from serve.messages import GenerationEvent, GenerationJob, Progress
from serve.settings import ServeSettings
from tests.live_server import Reply, ScriptedPool, finished, parse_reply, read_reply, request_bytes, serving, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a reset is looked for with Linux's TCP_INFO")

GENERATE = "/v1/images/generations"
IMAGE = json.dumps({"prompt": "a", "seed": 1}).encode()
STREAM = json.dumps({"prompt": "a", "seed": 1, "stream": True, "progress": True}).encode()


async def slow(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    if job.wants_progress:
        yield Progress(1, 64)
    await asyncio.sleep(0.3)
    yield finished(job)


async def never(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    if job.wants_progress:
        yield Progress(1, 64)
    await asyncio.sleep(3600)
    yield finished(job)


@pytest.fixture
def port() -> Iterator[int]:
    with serving(build_api(ScriptedPool(slow), ServeSettings(page=False))) as port:
        yield port


def half_closed(port: int, request: bytes) -> Reply:
    """The reply to a client that says at once that it sends nothing more; read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


@pytest.mark.parametrize("kept", ["close", ""])
def test_it_gets_its_reply_and_then_the_end(port: int, kept: str) -> None:
    """It got none: the end of what it sent was taken for a hang-up."""
    reply = half_closed(port, request_bytes("POST", GENERATE, body=IMAGE, port=port, headers={"connection": kept}))
    assert (reply.status, reply.headers["connection"], reply.json()["data"][0]["seed"]) == (200, "close", 1)


def test_a_stream_that_has_begun_goes_on_to_its_end(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request_bytes("POST", GENERATE, body=STREAM, port=port))
        received = b""
        while b"progress" not in received:
            received += connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            received += part
    assert b"\r\n0" in received.partition(b"\r\n\r\n")[2], "a zero before the size of the next chunk"
    assert b"image_generation.completed" in parse_reply(received).body


def test_pipelined_requests_are_all_answered(port: int) -> None:
    request = request_bytes("POST", GENERATE, body=IMAGE, port=port, headers={"connection": ""})
    incomplete = request[:-4]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request + request + incomplete[:20])
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 2


def test_a_client_that_waits_for_100_continue_gets_it_and_its_reply(port: int) -> None:
    headers = {"expect": "100-continue"}
    reply = half_closed(port, request_bytes("POST", GENERATE, body=IMAGE, port=port, headers=headers))
    assert reply.status in (100, 200)
    if reply.status == 100:
        assert reply.body.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HTTP/1.1\r\nhost", request_bytes("POST", GENERATE, body=IMAGE)[:-3]]
)
def test_without_a_complete_request_it_is_closed(port: int, sent: bytes) -> None:
    assert half_closed(port, sent).status == 0


@pytest.mark.parametrize("body", [IMAGE, STREAM])
def test_one_that_has_gone_is_noticed_though_it_ends_in_the_same_way(body: bytes) -> None:
    """A program that ends sends the same as one that half-closes: only what its machine does with a reply differs."""
    pool = ScriptedPool(never)
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        for half_closes in (False, True):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(request_bytes("POST", GENERATE, body=body, port=port))
                wait_until(lambda: pool.num_open == 1)
                if half_closes:
                    connection.shutdown(socket.SHUT_WR)
                    with pytest.raises(TimeoutError):
                        _wait_for_end(connection)
                    assert pool.num_open == 1, "it waits for its reply"
            wait_until(lambda: not pool.num_open)


def _wait_for_end(connection: socket.socket) -> None:
    """Looks at the socket for a moment without taking anything from it."""
    connection.settimeout(0.3)
    held: Any = b""
    while True:
        now = connection.recv(65536, socket.MSG_PEEK)
        if not now:
            return
        if now == held:
            raise TimeoutError
        held = now
        asyncio.run(asyncio.sleep(0.3))
