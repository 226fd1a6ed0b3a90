"""Concurrent load: latency by request size, fairness between a modest and a greedy sender, and tenfold overload."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from serving.client import Answer, LoadRun, closed_loop, open_loop, percentiles, summary
from serving.plan import GREEDY, MODEST, Bench
from serving.process import Server
from serving.speed import usage_row
from serving.traffic import SIZES, LoadRequest, mixed, poisson_times, with_keys

Row = dict[str, Any]
_GREEDY_CONCURRENCY = 8  # requests of 16 candidates: four times the slots of a CPU
_MODEST_SIZE = 4
_HEAD_START_S = 1.0


def sizes(bench: Bench, rate: float) -> Row:
    """Latency percentiles by number of candidates, of our server at a sustainable rate."""
    server, duration_s = bench.ours, bench.plan.sizes_s
    times_s = poisson_times(rate, duration_s, seed=500)
    run = asyncio.run(
        open_loop(server.address, with_keys(mixed(len(times_s), seed=500), server.keys), times_s, timeout_s=120.0)
    )
    by_size = {}
    for size in SIZES:
        own = [one for one in run.answers if one.request.num_candidates == size]
        by_size[str(size)] = {
            "requests": len(own),
            "latency_s": percentiles([one.latency_s for one in own if one.status == 200]),
        }
    return {"server": server.kind, "rate": rate, "by_size": by_size, **summary(run)}


def fairness(bench: Bench) -> Row:
    """Latencies of a modest sender alone, and beside one with eight large requests always in flight."""
    servers = [bench.ours, *(server for kind, server in bench.servers.items() if kind == "stock")]
    return {"modest_candidates": _MODEST_SIZE, "servers": {one.kind: _beside_greedy(bench, one) for one in servers}}


def _beside_greedy(bench: Bench, server: Server) -> Row:
    duration_s = bench.plan.fairness_s
    times_s = poisson_times(max(0.4, 3 / duration_s), duration_s, seed=600) or [0.0]
    modest = [
        LoadRequest(one.number, one.caption, one.seed, one.num_candidates, server.key_of.get(MODEST, ""))
        for one in mixed(len(times_s), seed=600, sizes=(_MODEST_SIZE,))
    ]
    alone = asyncio.run(open_loop(server.address, modest, times_s, timeout_s=120.0))
    beside, greedy = asyncio.run(_together(server, modest, [_HEAD_START_S + time_s for time_s in times_s], duration_s))
    return {
        "alone": _waits(alone.answers),
        "beside_greedy": _waits(beside.answers),
        "greedy_images": summary(greedy)["images"],
        "greedy_seconds": greedy.seconds,
    }


async def _together(
    server: Server, modest: Sequence[LoadRequest], times_s: Sequence[float], duration_s: float
) -> tuple[LoadRun, LoadRun]:
    key = server.key_of.get(GREEDY, "")
    endless = [
        LoadRequest(one.number, one.caption, one.seed, one.num_candidates, key)
        for one in mixed(2000, seed=700, sizes=(max(SIZES),))
    ]
    return await asyncio.gather(
        open_loop(server.address, modest, times_s, timeout_s=120.0),
        closed_loop(server.address, endless, concurrency=_GREEDY_CONCURRENCY, until_s=_HEAD_START_S + duration_s),
    )


def _waits(answers: Sequence[Answer]) -> Row:
    answered = [one for one in answers if one.status == 200]
    queued_s = [one.timings_s["queue"] for one in answered if "queue" in one.timings_s]
    return {
        "requests": len(answers),
        "answered": len(answered),
        "latency_s": percentiles([one.latency_s for one in answered]),
        "queue_s": percentiles(queued_s),
    }


def overload(server: Server, *, rate: float, duration_s: float, deadline_s: float) -> Row:
    """Overload: admitted requests meet their deadline, all others are refused at once.

    Args:
        deadline_s: the server's; clients wait a little longer.
    """
    before = usage_row(server)
    times_s = poisson_times(rate, duration_s, seed=800)
    requests = with_keys(mixed(len(times_s), seed=800), server.keys)
    run = asyncio.run(open_loop(server.address, requests, times_s, timeout_s=deadline_s + 10.0))
    refused = [one for one in run.answers if one.status == 429]
    others = [one for one in run.answers if one.status not in (200, 429)]
    return {
        "server": server.kind,
        "rate": rate,
        "deadline_s": deadline_s,
        "refused": len(refused),
        "share_refused": len(refused) / len(run.answers),
        "refused_with_retry_after": sum(one.retry_after_s is not None for one in refused),
        "refused_s": percentiles([one.took_s for one in refused]),
        "refused_from_sending_s": percentiles([one.ended_s - one.sent_s for one in refused]),
        "admitted_not_answered": len(others),
        "others": dict(Counter(f"{one.status} {one.code}" for one in others)),
        # Time outside the phases that a worker measures: mostly waiting for the postprocessing thread.
        "between_phases_s": percentiles([_between_phases_s(one) for one in run.answers if one.status == 200]),
        "usage_before": before,
        "usage_after": usage_row(server),
        **summary(run),
    }


def _between_phases_s(answer: Answer) -> float:
    phases = dict(answer.timings_s)
    return phases.pop("total") - sum(phases.values())
