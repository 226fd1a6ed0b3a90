"""Overhead of serving: saturated throughput relative to the engine alone, and milliseconds added to a single request."""

import asyncio
import hashlib
import io
import json
import statistics
import time
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from PIL import Image

from serving.client import GENERATIONS, Answer, percentile, percentiles, read_metrics
from serving.plan import Bench, in_turn, load_fully
from serving.process import Server
from serving.traffic import SIZES, LoadRequest, mixed

Row = dict[str, Any]
_METRICS_LATE_S = 1.5  # processes on Ray report their metrics once a second


def calibrate(bench: Bench) -> Row:
    """Unloaded latencies, saturated requests per second and equality of images of each server."""
    plan, rows, images = bench.plan, Row(), dict[str, list[str]]()
    singles, load = mixed(max(len(SIZES), plan.single_requests // 2), seed=1), mixed(plan.requests, seed=2)
    for kind, server in bench.servers.items():
        alone = load_fully(server, singles, concurrency=1)
        images[kind] = [image_digest(one.body) for one in alone.answers]
        full = load_fully(server, load, concurrency=plan.concurrency)
        rows[kind] = {
            "unloaded_s": percentiles([one.latency_s for one in alone.answers]),
            "requests_per_s": len(full.answers) / full.seconds,
        }
    first = next(iter(images.values()))
    equal = {kind: sum(a == b for a, b in zip(own, first, strict=True)) for kind, own in images.items()}
    return {"servers": rows, "equal_images": {"compared": len(first), "equal": equal}}


def saturation(bench: Bench) -> Row:
    """Requests per second with a constant backlog, the same requests to each system in turn.

    `shares`: relative to the engine in the same round. `cpu_s_per_request`: of all processes of a system; other programs on
    the machine affect it less than wall time.
    """
    plan = bench.plan
    ways = ["engine", *(kind for kind in bench.servers if kind != "stock")]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s: dict[str, list[float]] = {way: [] for way in ways}
    client_cpu_shares = []
    for number in range(plan.rounds):
        requests = mixed(plan.requests, seed=100 + number)
        for way in in_turn(ways, number):
            used_s = _cpu_s(bench, way)
            if way == "engine":
                seconds = _engine_seconds(bench, requests)
            else:
                run = load_fully(bench.servers[way], requests, concurrency=plan.concurrency)
                seconds = run.seconds
                client_cpu_shares.append(run.client_cpu_s / run.seconds)
            rates[way].append(len(requests) / seconds)
            cpu_s[way].append((_cpu_s(bench, way) - used_s) / len(requests))
    shares = {
        way: spread([own / alone for own, alone in zip(rates[way], rates["engine"], strict=True)]) for way in ways[1:]
    }
    mean_size = statistics.mean(SIZES)
    return {
        "requests_per_s": {way: spread(values) for way, values in rates.items()},
        "images_per_s": {way: mean_size * statistics.median(values) for way, values in rates.items()},
        "shares": shares,
        "cpu_s_per_request": {way: spread(values) for way, values in cpu_s.items()},
        "client_cpu_share": max(client_cpu_shares),
    }


def _cpu_s(bench: Bench, way: str) -> float:
    return bench.engine.cpu_s() if way == "engine" else bench.servers[way].usage().cpu_s


def _engine_seconds(bench: Bench, requests: Sequence[LoadRequest]) -> float:
    run = bench.engine.run(requests, concurrency=bench.plan.concurrency)
    if not all(one.is_finished for one in run.results):
        raise RuntimeError("the worker refused a job")
    return run.seconds


def concurrency_one(bench: Bench) -> Row:
    """One request at a time, of all sizes, to each system in turn.

    `added_ms`: latency minus the worker's own time, which each response reports. Image encoding is part of the worker's time.
    `worker_against_alone_ms`: the worker's own time in the server minus that of the worker without a server, for the same
    request; it contains the machine's noise twice, so its middle half is given, too.
    """
    requests = mixed(bench.plan.single_requests, seed=3)
    ways = ["engine", "pipeline", *(kind for kind in bench.servers if kind != "stock")]
    took_s: dict[str, dict[int, float]] = {way: {} for way in ways}
    answers: dict[str, list[Answer]] = {way: [] for way in ways}
    before = {way: _api_server_total(bench.servers[way]) for way in ways[2:]}
    for first in range(0, len(requests), len(SIZES)):
        group = requests[first : first + len(SIZES)]
        for way in in_turn(ways, first // len(SIZES)):
            if way in ("engine", "pipeline"):
                run = bench.engine.run(group, way="worker" if way == "engine" else "pipeline")
                took_s[way] |= {one.number: one.took_s for one in run.results}
            else:
                answers[way] += load_fully(bench.servers[way], group, concurrency=1).answers
                took_s[way] |= {one.request.number: one.latency_s for one in answers[way]}
    return {
        "total_s": {way: percentiles(list(values.values())) for way, values in took_s.items()},
        "servers": {
            way: _added(answers[way], took_s["engine"])
            | _hops(answers[way], before[way], _api_server_total(bench.servers[way]))
            for way in ways[2:]
        },
    }


def _api_server_total(server: Server) -> tuple[float, int]:
    """Seconds that the API servers have spent on generation requests, and the number of these requests."""
    time.sleep(_METRICS_LATE_S)
    key = next(iter(server.keys), "")
    own = [one for one in asyncio.run(read_metrics(server.address, key=key)) if one.labels.get("route") == GENERATIONS]
    seconds, count = (
        sum(one.value for one in own if one.name == f"kodalle_request_seconds_{name}") for name in ("sum", "count")
    )
    return seconds, int(count)


def _hops(answers: Sequence[Answer], before: tuple[float, int], after: tuple[float, int]) -> Row:
    """The added latency in two parts, as means, because API servers report sums."""
    if after[1] - before[1] != len(answers):
        raise RuntimeError(f"the API servers counted {after[1] - before[1]} requests, {len(answers)} were answered")
    api_server_s = (after[0] - before[0]) / len(answers)
    worker_s = statistics.mean(one.timings_s["total"] for one in answers)
    client_s = statistics.mean(one.latency_s for one in answers)
    return {
        "mean_ms": {
            "client_to_api_server": 1e3 * (client_s - api_server_s),
            "api_server_to_worker": 1e3 * (api_server_s - worker_s),
        }
    }


def _added(answers: Sequence[Answer], alone_s: dict[int, float]) -> Row:
    added_ms = [1e3 * (one.latency_s - one.timings_s["total"]) for one in answers]
    against_ms = [1e3 * (one.timings_s["total"] - alone_s[one.request.number]) for one in answers]
    phases = {name for one in answers for name in one.timings_s}
    return {
        "added_ms": {"median": statistics.median(added_ms), "p95": percentile(added_ms, 0.95), "least": min(added_ms)},
        "worker_against_alone_ms": {
            "median": statistics.median(against_ms),
            "quartiles": [percentile(against_ms, 0.25), percentile(against_ms, 0.75)],
        },
        "worker_phases_ms": {
            name: 1e3 * statistics.median(one.timings_s[name] for one in answers) for name in sorted(phases)
        },
    }


def idle_cpu_shares(bench: Bench, *, seconds: float) -> dict[str, float]:
    """Cores that each server uses while idle, which it takes from the one that is measured."""
    before = {kind: server.usage().cpu_s for kind, server in bench.servers.items()}
    time.sleep(seconds)
    return {kind: (server.usage().cpu_s - before[kind]) / seconds for kind, server in bench.servers.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": list(values)}


def image_digest(body: bytes) -> str:
    """Digest of the pixels of a response's first image, without metadata, which differs between servers."""
    data = b64decode(json.loads(body)["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def usage_row(server: Server) -> Row:
    usage = server.usage()
    return {
        "processes": usage.num_processes,
        "rss_mib": usage.rss_bytes / 2**20,
        "own_mib": usage.own_bytes / 2**20,
        "files": usage.num_files,
    }
