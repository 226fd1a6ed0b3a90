"""Clients that read nothing, little, or at their pace, on real sockets: the listener's own timers in test_listener.py."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from serve.api import listener
from serve.api.application import build_api
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, request_bytes, serving, wait_until


def slow_client(port: int) -> socket.socket:
    """A connection whose packets and window are those of a network: on loopback the socket takes what is sent, unread."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.fixture
def files_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(listener, "WRITE_TIMEOUT_S", 0.5)
    with serving(build_api(ScriptedPool(), ServeSettings(page=True))) as port:
        yield port


def is_held(connection: socket.socket) -> bool:
    """Whether the server, which is this process, has its side of it."""
    number = connection.getsockname()[1]
    return any(one.raddr and one.raddr.port == number for one in psutil.Process().net_connections("tcp4"))


FILE = "/page/texts_ko.js"


@pytest.mark.parametrize("count", [1, 4, 9])
def test_finished_replies_that_stay_unread_end_their_connection(files_port: int, count: int) -> None:
    """One is in the socket alone, several wait behind it; uvicorn's keep-alive was the first to end them."""
    with slow_client(files_port) as connection:
        connection.sendall(request_bytes("GET", FILE, port=files_port, headers={"connection": ""}) * count)
        wait_until(lambda: is_held(connection))
        wait_until(lambda: not is_held(connection), within_s=20)


def test_a_request_now_and_then_keeps_no_connection_that_is_not_read(files_port: int) -> None:
    request = request_bytes("GET", FILE, port=files_port, headers={"connection": ""})
    with slow_client(files_port) as connection, suppress(ConnectionError):

        def is_held_after_one_more() -> bool:
            connection.send(request)
            time.sleep(0.1)
            return is_held(connection)

        wait_until(lambda: not is_held_after_one_more(), within_s=20)


def test_a_client_that_drips_is_closed(files_port: int) -> None:
    request = request_bytes("GET", FILE, port=files_port, headers={"connection": ""})
    with slow_client(files_port) as connection, suppress(ConnectionError):
        connection.sendall(request * 9)

        def is_held_after_one_more() -> bool:
            connection.recv(536)
            time.sleep(0.1)
            return is_held(connection)

        wait_until(lambda: not is_held_after_one_more(), within_s=20)


def test_clients_that_read_at_their_pace_are_kept(files_port: int) -> None:
    """The small replies of a client that polls are never many bytes, and the latest is always on its way."""
    request = request_bytes("GET", "/healthz", port=files_port, headers={"connection": ""})
    with socket.create_connection(("127.0.0.1", files_port), timeout=10) as connection:
        for _ in range(12):
            connection.sendall(request)
            received = b""
            while not received.endswith(b'{"status":"ok"}'):
                part = connection.recv(65536)
                assert part, "the server closed the connection"
                received += part
            time.sleep(0.2)
