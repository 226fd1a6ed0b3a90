"""Floods of connections: what they cost a server, and what an honest client waits meanwhile.

    python benchmarks/serve_floods.py --server direct --out benchmarks/results/serve_floods
    python benchmarks/serve_floods.py --server ray --only heads

    reads      600 clients that request 9 files each, and read all: what so many requests cost by themselves, without a bar for memory
    readers    600 clients that request 9 files each, and read nothing               bar: all closed within 65 s
    drips      600 clients that request 9 files each, and read 268 bytes a second    bar: all closed within 125 s
    pipelines  200 clients that send 1,300 requests each, in one write                bar: all closed within 65 s
    heads      1,100 connections that send half of a head and wait                   bar: all closed within 15 s
    trailers   8 clients without a key that send 48 MB of trailers, again and again   bar: each is refused

They come from one address. Two honest clients, one at that address and one at another, fetch /v1/models and generate an image
in turn, on a new connection each time. Bars for all: no request of the client at another address fails, the server's memory rises by
less than 64 MiB or 128 KiB a connection, and its log has no traceback. The quiet server is measured first.

The last line is one JSON document.
"""

import argparse
import http.client
import json
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from machine_facts import print_document, store_served
from sampling.plan import write_random_model
from serving.client import GENERATIONS, percentile
from serving.process import Server, end_on_sigterm, serving

from engine.facts import facts

_FLOOD_ADDRESS, _OTHER_ADDRESS = "127.0.0.2", "127.0.0.1"
_READERS, _DRIPS, _PIPELINES, _HEADS, _TRAILERS = 600, 600, 200, 1100, 8
_FILE = "/page/texts_ko.js"
_FILES_A_READER = 9  # as many as a connection may queue: 170 KB
_REQUESTS_A_PIPELINE = 1300
# Of a network's packets. Loopback's are so large that the server's socket would hold all that it sends, unread.
_SEGMENT_BYTES, _WINDOW_BYTES = 536, 4096
_DRIP_EACH_S = 2.0
_READS_AT_ONCE = 32
_TRAILER_BYTES = 48 * 10**6
_TRAILERS_FOR_S = 10.0
# The write timeout is 30 s, and each look at it may find the last bytes that a client's machine has room for.
_CLOSED_WITHIN_S = {"readers": 65.0, "drips": 125.0, "pipelines": 65.0, "heads": 15.0}
_LEAST_RISE_BYTES, _RISE_A_CONNECTION_BYTES = 64 * 2**20, 128 * 2**10  # of the bar
_GONE_FOR_S = 3.0  # without any socket of the flood: none waits to be accepted either
_QUIET_S = 10.0
Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    document: Row = {"benchmark": "serve_floods", **facts(torch.device("cpu"))}
    document["config"] = {"server": arguments.server, "readers": _READERS, "drips": _DRIPS}
    document["config"] |= {"pipelines": _PIPELINES, "heads": _HEADS, "trailers": _TRAILERS}
    with tempfile.TemporaryDirectory(prefix="serve-floods-") as folder:
        model = Path(folder, "model")
        write_random_model(model, tiny=True)
        with serving(arguments.server, {"model": str(model), "num_slots": 8}, key_names=("honest",)) as server:
            with observed(server) as row:
                time.sleep(_QUIET_S)
            document["quiet"] = row
            document["floods"] = {name: measured(server, name) for name in arguments.only.split(",")}
    document["is_met"] = all(row["is_met"] for row in document["floods"].values())
    store_served(document, arguments.out, prefix=f"{arguments.server}-")
    print_document(document)
    return 0 if document["is_met"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("direct", "ray"), default="direct")
    parser.add_argument("--only", default=",".join(FLOODS), help="floods, in this order")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - FLOODS.keys()
    if unknown:
        parser.error(f"no such flood: {', '.join(sorted(unknown))}")
    return arguments


def measured(server: Server, name: str) -> Row:
    with observed(server) as row:
        row |= FLOODS[name](server)
    row["tracebacks"] = server.errors().count("Traceback")
    others = row["honest"]["at another address"]
    rise = row["rss_bytes"]["most"] - row["rss_bytes"]["before"]
    row["is_met"] = (
        row["still_open"] == 0
        and row["tracebacks"] == 0
        and not row.get("not_refused", 0)
        and not row.get("not_answered", 0)
        and (row.get("is_control", False) or rise < max(_LEAST_RISE_BYTES, row["opened"] * _RISE_A_CONNECTION_BYTES))
        and others["failed"] == {}
        and others["models_s"]["requests"] > 0
    )
    print(f"{name:9} {'met' if row['is_met'] else 'NOT MET'}  {json.dumps(row)}", flush=True)
    return row


# ----------------------------------------------------------------------------------------------------------- the floods


def reads(server: Server) -> Row:
    kept = f"GET {_FILE} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * (_FILES_A_READER - 1)
    last = f"GET {_FILE} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()

    def read_all(_: int) -> int:
        with socket.create_connection(_place(server), timeout=60, source_address=(_FLOOD_ADDRESS, 0)) as connection:
            connection.sendall(kept + last)
            count = 0
            while part := connection.recv(65536):
                count += part.count(b"HTTP/1.1 200")
            return count

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        answered = sum(pool.map(read_all, range(_READERS)))
    missing = _READERS * _FILES_A_READER - answered
    return {"opened": _READERS, "still_open": 0, "answered": answered, "not_answered": missing, "is_control": True}


def readers(server: Server) -> Row:
    request = f"GET {_FILE} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * _FILES_A_READER
    flood = _open(server, _READERS, request, is_slow=True)
    return _closed(server, flood, within_s=_CLOSED_WITHIN_S["readers"])


def drips(server: Server) -> Row:
    request = f"GET {_FILE} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * _FILES_A_READER
    flood = _open(server, _DRIPS, request, is_slow=True)
    is_over = threading.Event()

    def read() -> None:
        while not is_over.wait(_DRIP_EACH_S):
            for _, connection in flood:
                with suppress(OSError):
                    connection.recv(_SEGMENT_BYTES)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        return _closed(server, flood, within_s=_CLOSED_WITHIN_S["drips"])
    finally:
        is_over.set()
        reader.join()


def pipelines(server: Server) -> Row:
    request = f"GET {_FILE} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * _REQUESTS_A_PIPELINE
    flood = _open(server, _PIPELINES, request, is_slow=True)
    return _closed(server, flood, within_s=_CLOSED_WITHIN_S["pipelines"])


def heads(server: Server) -> Row:
    flood = _open(server, _HEADS, b"GET /v1/models HTTP/1.1\r\nhost: local")
    return _closed(server, flood, within_s=_CLOSED_WITHIN_S["heads"])


def trailers(server: Server) -> Row:
    """Each client sends for as long as the server takes it, then begins again."""
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    lines = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(100))
    sent: list[int] = []
    answers: Counter[str] = Counter()
    ends_at = time.monotonic() + _TRAILERS_FOR_S

    def send_one() -> None:
        count, answer = 0, "none"
        with socket.create_connection(_place(server), timeout=20, source_address=(_FLOOD_ADDRESS, 0)) as connection:
            with suppress(OSError):
                connection.sendall(head.encode())
                while count < _TRAILER_BYTES:
                    count += connection.send(lines)
            with suppress(OSError):
                answer = connection.recv(4096).partition(b"\r\n")[0].decode() or answer
        sent.append(count)
        answers[answer] += 1

    def client() -> None:
        while time.monotonic() < ends_at:
            send_one()

    threads = [threading.Thread(target=client) for _ in range(_TRAILERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = sum(count for answer, count in answers.items() if " 2" in answer)
    return {
        "opened": len(sent),
        "still_open": 0,
        "sent_bytes": {"each_at_most": max(sent), "all": sum(sent)},
        "answers": dict(answers),
        "not_refused": accepted,
    }


FLOODS: dict[str, Callable[[Server], Row]] = {
    "reads": reads,
    "readers": readers,
    "drips": drips,
    "pipelines": pipelines,
    "heads": heads,
    "trailers": trailers,
}


def _open(server: Server, count: int, request: bytes, *, is_slow: bool = False) -> list[tuple[float, socket.socket]]:
    """Connections, each with its request sent as far as the server takes it, and when they were opened."""
    flood = []
    for _ in range(count):
        connection = socket.socket()
        if is_slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
        connection.bind((_FLOOD_ADDRESS, 0))
        with suppress(OSError):
            connection.settimeout(5)
            connection.connect(_place(server))
            connection.setblocking(False)
            connection.send(request)
        flood.append((time.monotonic(), connection))
    return flood


def _closed(server: Server, flood: list[tuple[float, socket.socket]], *, within_s: float) -> Row:
    """Waits until the server has closed them, by its own sockets: a client that reads nothing does not see an end."""
    opened_at = {connection.getsockname()[1]: at for at, connection in flood}
    took_s: dict[int, float] = {}
    seen: set[int] = set()
    held: set[int] = set()
    last_held_s = time.monotonic()
    ends_at = last_held_s + within_s
    while time.monotonic() < min(ends_at, last_held_s + _GONE_FOR_S):
        held = _ports_held(server) & opened_at.keys()
        now_s = time.monotonic()
        last_held_s = now_s if held else last_held_s
        took_s |= {port: now_s - opened_at[port] for port in seen - held if port not in took_s}
        seen |= held
        time.sleep(0.5)
    for _, connection in flood:
        connection.close()
    spread = {"median": percentile(list(took_s.values()), 0.5), "most": max(took_s.values())} if took_s else None
    row = {"opened": len(flood), "seen_open": len(seen), "still_open": len(held), "closed_after_s": spread}
    return row  # the others were refused, or ended for newer ones, between two looks


def _ports_held(server: Server) -> set[int]:
    """Ports of the flood's address to which the server has a socket."""
    ports = set()
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):
            ports |= {one.raddr.port for one in process.net_connections("tcp4") if one.raddr[:1] == (_FLOOD_ADDRESS,)}
    return ports


def _place(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.address)
    return "127.0.0.1", int(parts.port or 0)


# ------------------------------------------------------------------------------------------- the server and its clients


@contextmanager
def observed(server: Server) -> Iterator[Row]:
    """Memory, files and honest clients while the block runs; the row is filled at its end."""
    is_over = threading.Event()
    row: Row = {}
    clients = {"at another address": _Honest(server, _OTHER_ADDRESS), "at the flood's": _Honest(server, _FLOOD_ADDRESS)}
    before = most = _usage(server)

    def sample() -> None:
        nonlocal most
        while not is_over.is_set():
            now = _usage(server)
            most = max(most[0], now[0]), max(most[1], now[1])
            time.sleep(0.2)

    threads = [threading.Thread(target=sample)]
    threads += [threading.Thread(target=one.run, args=(is_over,)) for one in clients.values()]
    for thread in threads:
        thread.start()
    try:
        yield row
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    after = _usage(server)
    for place, name in enumerate(("rss_bytes", "files")):
        row[name] = {"before": before[place], "most": most[place], "after": after[place]}
    row["honest"] = {name: one.row() for name, one in clients.items()}


def _usage(server: Server) -> tuple[int, int]:
    """Bytes in memory and open files of all its processes; cheaper to read than `Server.usage`."""
    rss_bytes = num_files = 0
    for process in server.processes():
        with suppress(psutil.NoSuchProcess), process.oneshot():
            rss_bytes += process.memory_info().rss
            num_files += process.num_fds()
    return rss_bytes, num_files


class _Honest:
    """A client that fetches the model's card and generates an image, in turn."""

    def __init__(self, server: Server, address: str) -> None:
        self._server, self._address = server, address
        self._took_s: dict[str, list[float]] = {"models": [], "generation": []}
        self._failed: dict[str, int] = {}

    def run(self, is_over: threading.Event) -> None:
        body = json.dumps({"prompt": "빨강", "candidates": 1, "seed": 1})
        while not is_over.is_set():
            self._send("models", "GET", "/v1/models", None)
            self._send("generation", "POST", GENERATIONS, body)
            time.sleep(0.05)

    def _send(self, name: str, method: str, path: str, body: str | None) -> None:
        (key,) = self._server.keys
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "connection": "close"}
        host, port = _place(self._server)
        started_s = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=30, source_address=(self._address, 0))
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            reply.read()
            outcome = "" if reply.status == 200 else str(reply.status)
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
        finally:
            connection.close()
        if outcome:
            self._failed[outcome] = self._failed.get(outcome, 0) + 1
        else:
            self._took_s[name].append(time.monotonic() - started_s)

    def row(self) -> Row:
        row: Row = {"failed": self._failed}
        for name, took_s in self._took_s.items():
            row[f"{name}_s"] = {"requests": len(took_s)} | (
                {"p50": percentile(took_s, 0.5), "p99": percentile(took_s, 0.99), "most": max(took_s)} if took_s else {}
            )
        return row


if __name__ == "__main__":
    sys.exit(main())
