"""Soak test: what a server retains after 20,000 small requests: memory, open files, slots, queue positions.

    python benchmarks/serve_soak.py --server direct --out benchmarks/results/serve_soak
    python benchmarks/serve_soak.py --server ray --requests 2000 --model models/garments

Of twenty requests 16 are plain, one is streamed with previews, one is rejected for its fields, one disconnects at once and
one while it is running. The first tenth is a warm-up: allocators and thread pools reach their size. Over the rest a line is
fitted to the memory of all processes; its rise over the whole soak must stay below 5 %.
The last line is one JSON document.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import torch
from machine_facts import print_document, store_served
from sampling.plan import write_random_model
from serving.client import GENERATIONS, read_metrics, served_model
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import captions

from engine.facts import facts

_BAR = 0.05
_SAMPLES = 60
_CONCURRENCY = 12
_FIRST = 60  # requests that open lasting connections
_GAUGES = ("kodalle_slots_in_use", "kodalle_queued_sequences", "kodalle_queued_requests", "kodalle_requests_in_flight")
_REST_S = 6.0  # longer than the coordinator keeps reports of other processes
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("direct", "ray"), default="direct")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    end_on_sigterm()
    document: Row = {"benchmark": "serve_soak", **facts(torch.device("cpu"))}
    document["config"] = {
        "server": arguments.server,
        "requests": arguments.requests,
        "concurrency": _CONCURRENCY,
    }
    with tempfile.TemporaryDirectory(prefix="serve-soak-") as folder:
        model = arguments.model or Path(folder, "tiny-random")
        if arguments.model is None:
            write_random_model(model, tiny=True)
        with serving(arguments.server, {"model": str(model), "num_slots": 16}) as server:
            document["config"]["model"] = asyncio.run(served_model(server.address))
            document |= asyncio.run(soak(server, arguments.requests))
    document["is_met"] = is_met(document)
    store_served(document, arguments.out, prefix=f"{arguments.server}-")
    print(
        f"{arguments.requests} requests in {document['seconds']:.0f} s: memory {document['rss_rise']:+.2%} "
        f"(own pages {document['own_rise']:+.2%}), files {document['files_rise']:+d}, gauges {document['gauges_after']}, "
        f"unexpected {document['unexpected']}"
    )
    print_document(document)
    return 0 if document["is_met"] else 1


def is_met(document: Row) -> bool:
    """Whether all bars are met: memory, files, gauges, and every response as expected."""
    return bool(
        document["rss_rise"] < _BAR
        and document["own_rise"] < _BAR
        and document["files_rise"] <= 0
        and not any(document["gauges_after"].values())
        and not document["unexpected"]
    )


async def soak(server: Server, count: int, *, rest_s: float = _REST_S) -> Row:
    """Sends all requests; samples the server sixty times, and at rest before and after."""
    samples: list[Row] = []
    every = max(1, count // _SAMPLES)

    async def sample(number: int) -> None:
        if number % every == 0:
            samples.append({"requests": number} | await asyncio.to_thread(_sample, server))

    await _send_all(server, _FIRST, lambda _: asyncio.sleep(0))
    await asyncio.sleep(rest_s)
    at_rest_before, started_s = _sample(server), time.perf_counter()
    ends = await _send_all(server, count, sample)
    seconds = time.perf_counter() - started_s
    await asyncio.sleep(rest_s)
    samples.append({"requests": count} | _sample(server))
    settled = [row for row in samples if row["requests"] >= count / 10]
    positions = [row["requests"] for row in settled]
    return {
        "seconds": seconds,
        "ends": dict(ends),
        "unexpected": {name: number for name, number in ends.items() if name.startswith("unexpected")},
        "rss_rise": relative_rise(positions, [row["rss_mib"] for row in settled], over=count),
        "own_rise": relative_rise(positions, [row["own_mib"] for row in settled], over=count),
        # Both at rest, because connections of clients are files, too.
        "files_rise": samples[-1]["files"] - at_rest_before["files"],
        "gauges_after": await gauges(server),
        "samples": samples,
    }


async def _send_all(server: Server, count: int, sample: Callable[[int], Awaitable[None]]) -> Counter[str]:
    """Counts of requests by outcome; `sample` is called with each one's number before it is sent."""
    ends, numbers, prompts = Counter[str](), iter(range(count)), captions()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def sender() -> None:
            for number in numbers:
                await sample(number)
                ends[await _send(session, server.address, number, prompts)] += 1

        await asyncio.gather(*(sender() for _ in range(_CONCURRENCY)))
    return ends


def relative_rise(positions: Sequence[float], values: Sequence[float], *, over: float) -> float:
    """The slope of the least-squares line through the values, times `over`, as a share of their mean."""
    slope = statistics.linear_regression(positions, values).slope
    return slope * over / statistics.mean(values)


async def gauges(server: Server) -> dict[str, float]:
    """Gauges that should be 0 at rest, without the scrape itself."""
    samples = await read_metrics(server.address)
    found = {name: sum(one.value for one in samples if one.name == name) for name in _GAUGES}
    return found | {"kodalle_requests_in_flight": found["kodalle_requests_in_flight"] - 1}


def _sample(server: Server) -> Row:
    usage = server.usage()
    return {
        "rss_mib": usage.rss_bytes / 2**20,
        "own_mib": usage.own_bytes / 2**20,
        "files": usage.num_files,
        "processes": usage.num_processes,
    }


async def _send(session: aiohttp.ClientSession, address: str, number: int, prompts: Sequence[str]) -> str:
    """Sends one request; returns its outcome, `unexpected …` for a wrong one."""
    body: Row = {"prompt": prompts[number % len(prompts)], "seed": number, "candidates": 1}
    kind = {3: "streamed", 8: "refused", 13: "disconnected at once", 18: "disconnected"}.get(number % 20, "plain")
    wanted = 200
    if kind == "streamed":
        body |= {"stream": True, "partial_images": 1}
    elif kind == "refused":
        body, wanted = body | {"temperature": -1}, 400
    elif kind.startswith("disconnected"):
        # Sixteen candidates take longer than the client stays.
        timeout_s = 0.002 if kind == "disconnected at once" else 0.03
        body["candidates"] = 16
        with suppress(TimeoutError, aiohttp.ClientError):
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with session.post(address + GENERATIONS, json=body, timeout=timeout) as reply:
                await reply.read()
        return kind
    try:
        async with session.post(address + GENERATIONS, json=body) as reply:
            content = await reply.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"unexpected {type(error).__name__} of {kind}"
    is_right = reply.status == wanted and (
        b'"completed"' in content or b"image_generation.completed" in content
        if kind == "streamed"
        else wanted == 400 or bool(json.loads(content)["data"][0]["b64_json"])
    )
    return kind if is_right else f"unexpected {reply.status} of {kind}"


if __name__ == "__main__":
    sys.exit(main())
