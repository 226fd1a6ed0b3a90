"""Disconnecting clients: whether the server goes on generating for them, and for how long their slots are held.

    python benchmarks/serve_hangups.py --server ray --model models/garments --out benchmarks/results/serve_hangups
    python benchmarks/serve_hangups.py --server direct --hangups 40

Requests for many candidates are sent and their connections closed after 20 to 600 ms: while they are read, queued or
running; half of them are streams, and half have the header with which any client can keep Ray Serve from cancelling. Bars:
none of them is finished, and a second after the last disconnect no slot and no queue position is held, according to the
workers' own gauges.

The negative control is a request whose client stays: it is finished, and its slots are seen to be held meanwhile.
The last line is one JSON document.
"""

import argparse
import asyncio
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from machine_facts import print_document, store_served
from sampling.plan import write_random_model
from serving.client import GENERATIONS, served_model
from serving.process import Server, end_on_sigterm, serving

from engine.facts import facts

_CONCURRENCY = 8
_CANDIDATES = 64  # seconds of generation
_FREE_WITHIN_S = 1.0
_REPORTED_WITHIN_S = 1.5  # Ray: metrics of other processes come once a second
_GAUGES = ("kodalle_slots_in_use", "kodalle_queued_sequences", "kodalle_queued_requests", "kodalle_requests_in_flight")
Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    document: Row = {"benchmark": "serve_hangups", **facts(torch.device("cpu"))}
    document["config"] = {
        "server": arguments.server,
        "hangups": arguments.hangups,
        "candidates": _CANDIDATES,
    }
    with tempfile.TemporaryDirectory(prefix="serve-hangups-") as folder:
        model = (arguments.model or Path(folder, "model")).resolve()
        if arguments.model is None:
            write_random_model(model, tiny=True)
        served = {"model": str(model), "num_slots": 32, "max_queued_sequences": 1024}
        with serving(arguments.server, served) as server:
            document["config"]["model"] = asyncio.run(served_model(server.address))
            document |= measure(server, arguments.hangups)
    store_served(document, arguments.out, prefix=f"{arguments.server}-")
    print_document(document)
    return 0 if document["is_met"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("direct", "ray"), default="ray")
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
    parser.add_argument("--hangups", type=int, default=400)
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    return parser.parse_args()


def measure(server: Server, hangups: int) -> Row:
    """The control, the disconnects, and what is held after them."""
    report_s = 0.0 if server.kind == "direct" else _REPORTED_WITHIN_S
    held_at_most, control_status = _control(server)
    _wait_until_free(server, within_s=60.0)
    generated = server.metric("kodalle_images_generated_total")
    stages = _disconnect(server, hangups)
    gone_s = time.monotonic()
    free_after_s = _wait_until_free(server, within_s=60.0)
    time.sleep(2.0 + report_s)  # by now jobs that went on would be finished and reported, or be in a slot
    row: Row = {
        "control": {"status": control_status, "slots_held": held_at_most},
        "disconnected_after_ms": {"least": 20, "most": 600},
        "seconds": gone_s - stages["begun_s"],
        "answered_before_they_disconnected": stages["answered"],
        "images_finished_for_them": server.metric("kodalle_images_generated_total") - generated,
        "free_after_s": free_after_s,
        "reported_within_s": report_s,
        "gauges_after": {name: server.metric(name) for name in _GAUGES},
    }
    own = row["gauges_after"] | {"kodalle_requests_in_flight": row["gauges_after"]["kodalle_requests_in_flight"] - 1}
    row["is_met"] = (
        control_status == 200
        and held_at_most > 0
        and row["images_finished_for_them"] == 0
        and free_after_s <= _FREE_WITHIN_S + report_s
        and not any(own.values())  # except the scrape itself
    )
    return row


def _control(server: Server) -> tuple[float, int]:
    """A request whose client stays: the most slots seen to be held, and its status."""
    status: list[int] = []

    def wait() -> None:
        parts = urlsplit(server.address)
        connection = http.client.HTTPConnection(str(parts.hostname), int(parts.port or 0), timeout=120)
        connection.request("POST", GENERATIONS, _body(0, stream=False), {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        status.append(reply.status)
        connection.close()

    thread = threading.Thread(target=wait)
    thread.start()
    most = 0.0
    while thread.is_alive():
        most = max(most, server.metric("kodalle_slots_in_use"))
        time.sleep(0.05)
    thread.join()
    return most, status[0]


def _disconnect(server: Server, count: int) -> Row:
    """Sends requests and closes their connections, `_CONCURRENCY` at a time."""
    numbers, lock, answered = iter(range(count)), threading.Lock(), []
    begun_s = time.monotonic()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if _send_and_disconnect(server, number):
                answered.append(number)

    threads = [threading.Thread(target=client) for _ in range(_CONCURRENCY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"begun_s": begun_s, "answered": len(answered)}


def _send_and_disconnect(server: Server, number: int) -> bool:
    """True if a response came before the disconnect: a refusal, since no generation is that fast."""
    parts, chance = urlsplit(server.address), random.Random(number)
    body = _body(number, stream=number % 2 == 1)
    lines = ["POST " + GENERATIONS + " HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", *(["x-request-disconnect-disabled: ?1"] if number % 4 < 2 else [])]
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        connection.settimeout(chance.uniform(0.02, 0.6))
        try:
            return connection.recv(16)[9:12] not in (b"", b"200")
        except TimeoutError:
            return False


def _body(number: int, *, stream: bool) -> bytes:
    body = {"prompt": "상의에서 색상은 레드이다.", "seed": number, "n": 1, "candidates": _CANDIDATES, "stream": stream}
    return json.dumps(body).encode()


def _wait_until_free(server: Server, *, within_s: float) -> float:
    """Seconds until no worker holds a slot or a queue position."""
    started_s = time.monotonic()
    while any(server.metric(name) for name in _GAUGES[:3]):
        if time.monotonic() - started_s > within_s:
            return time.monotonic() - started_s
        time.sleep(0.02)
    return time.monotonic() - started_s


if __name__ == "__main__":
    sys.exit(main())
