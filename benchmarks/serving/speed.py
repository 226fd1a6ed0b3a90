"""What HTTP costs: throughput at saturation against the engine alone, and milliseconds added to a single request."""

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
from serving.traffic import SIZES, Asked, mixed

Row = dict[str, Any]
_METRICS_LATE_S = 1.5  # processes on Ray tell each other their figures once a second


def calibrate(bench: Bench) -> Row:
    """Of each server: unloaded latencies, saturated requests a second, and whether its pictures are the others'."""
    plan, rows, pictures = bench.plan, Row(), dict[str, list[str]]()
    singles, crowd = mixed(max(len(SIZES), plan.single_requests // 2), seed=1), mixed(plan.requests, seed=2)
    for kind, server in bench.servers.items():
        alone = load_fully(server, singles, concurrency=1)
        pictures[kind] = [picture_digest(one.body) for one in alone.answers]
        full = load_fully(server, crowd, concurrency=plan.concurrency)
        rows[kind] = {
            "unloaded_s": percentiles([one.latency_s for one in alone.answers]),
            "requests_per_s": len(full.answers) / full.seconds,
        }
    first = next(iter(pictures.values()))
    equal = {kind: sum(a == b for a, b in zip(own, first, strict=True)) for kind, own in pictures.items()}
    return {"servers": rows, "equal_pictures": {"compared": len(first), "equal": equal}}


def saturation(bench: Bench) -> Row:
    """Requests a second with a constant backlog, the same requests in turn to each.

    `shares`: of the engine's own in the same round. `cpu_s_per_request`: of all its processes, which other programs
    on the machine change less than they change seconds.
    """
    plan = bench.plan
    ways = ["engine", *(kind for kind in bench.servers if kind != "stock")]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s: dict[str, list[float]] = {way: [] for way in ways}
    client_cpu_shares = []
    for number in range(plan.rounds):
        asked = mixed(plan.requests, seed=100 + number)
        for way in in_turn(ways, number):
            used_s = _cpu_s(bench, way)
            if way == "engine":
                seconds = _engine_seconds(bench, asked)
            else:
                run = load_fully(bench.servers[way], asked, concurrency=plan.concurrency)
                seconds = run.seconds
                client_cpu_shares.append(run.client_cpu_s / run.seconds)
            rates[way].append(len(asked) / seconds)
            cpu_s[way].append((_cpu_s(bench, way) - used_s) / len(asked))
    shares = {
        way: spread([own / alone for own, alone in zip(rates[way], rates["engine"], strict=True)]) for way in ways[1:]
    }
    mean_size = statistics.mean(SIZES)
    return {
        "requests_per_s": {way: spread(values) for way, values in rates.items()},
        "pictures_per_s": {way: mean_size * statistics.median(values) for way, values in rates.items()},
        "shares": shares,
        "cpu_s_per_request": {way: spread(values) for way, values in cpu_s.items()},
        "client_cpu_share": max(client_cpu_shares),
    }


def _cpu_s(bench: Bench, way: str) -> float:
    return bench.engine.cpu_s() if way == "engine" else bench.servers[way].usage().cpu_s


def _engine_seconds(bench: Bench, asked: Sequence[Asked]) -> float:
    run = bench.engine.run(asked, concurrency=bench.plan.concurrency)
    if not all(one.is_finished for one in run.drawn):
        raise RuntimeError("the worker refused a job")
    return run.seconds


def concurrency_one(bench: Bench) -> Row:
    """One request at a time, of all sizes, each way in turn.

    `added_ms`: what lies outside the worker, whose own time each answer tells: from the client's sending to the worker's
    taking on, and from its last byte to the client's. Encoding the picture is the worker's, so it is apart.
    `worker_against_alone_ms`: the worker's own time inside the server less that of the worker without a server, for
    the same request; it holds the machine's noise twice, so its middle half is told, too.
    """
    asked = mixed(bench.plan.single_requests, seed=3)
    ways = ["engine", "pipeline", *(kind for kind in bench.servers if kind != "stock")]
    took_s: dict[str, dict[int, float]] = {way: {} for way in ways}
    answers: dict[str, list[Answer]] = {way: [] for way in ways}
    before = {way: _edge_total(bench.servers[way]) for way in ways[2:]}
    for first in range(0, len(asked), len(SIZES)):
        group = asked[first : first + len(SIZES)]
        for way in in_turn(ways, first // len(SIZES)):
            if way in ("engine", "pipeline"):
                run = bench.engine.run(group, way="worker" if way == "engine" else "pipeline")
                took_s[way] |= {one.number: one.took_s for one in run.drawn}
            else:
                answers[way] += load_fully(bench.servers[way], group, concurrency=1).answers
                took_s[way] |= {one.asked.number: one.latency_s for one in answers[way]}
    return {
        "total_s": {way: percentiles(list(values.values())) for way, values in took_s.items()},
        "servers": {
            way: _added(answers[way], took_s["engine"])
            | _hops(answers[way], before[way], _edge_total(bench.servers[way]))
            for way in ways[2:]
        },
    }


def _edge_total(server: Server) -> tuple[float, int]:
    """Seconds that the server's edges have spent on drawing requests, and how many these were."""
    time.sleep(_METRICS_LATE_S)
    key = next(iter(server.keys), "")
    own = [one for one in asyncio.run(read_metrics(server.address, key=key)) if one.labels.get("route") == GENERATIONS]
    seconds, count = (
        sum(one.value for one in own if one.name == f"kodalle_request_seconds_{name}") for name in ("sum", "count")
    )
    return seconds, int(count)


def _hops(answers: Sequence[Answer], before: tuple[float, int], after: tuple[float, int]) -> Row:
    """What is added, in two parts, as means: edges tell sums."""
    if after[1] - before[1] != len(answers):
        raise RuntimeError(f"the edge counted {after[1] - before[1]} requests, {len(answers)} were answered")
    edge_s = (after[0] - before[0]) / len(answers)
    worker_s = statistics.mean(one.timings_s["total"] for one in answers)
    client_s = statistics.mean(one.latency_s for one in answers)
    return {"mean_ms": {"client_to_edge": 1e3 * (client_s - edge_s), "edge_to_worker": 1e3 * (edge_s - worker_s)}}


def _added(answers: Sequence[Answer], alone_s: dict[int, float]) -> Row:
    added_ms = [1e3 * (one.latency_s - one.timings_s["total"]) for one in answers]
    against_ms = [1e3 * (one.timings_s["total"] - alone_s[one.asked.number]) for one in answers]
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
    """Cores that each server uses while nobody asks it: what it takes from the one that is measured."""
    before = {kind: server.usage().cpu_s for kind, server in bench.servers.items()}
    time.sleep(seconds)
    return {kind: (server.usage().cpu_s - before[kind]) / seconds for kind, server in bench.servers.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "all": list(values)}


def picture_digest(body: bytes) -> str:
    """Of the first picture's pixels in an answer: servers may write other metadata beside them."""
    data = b64decode(json.loads(body)["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as picture:
        return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def usage_row(server: Server) -> Row:
    usage = server.usage()
    return {
        "processes": usage.num_processes,
        "rss_mib": usage.rss_bytes / 2**20,
        "own_mib": usage.own_bytes / 2**20,
        "files": usage.num_files,
    }
