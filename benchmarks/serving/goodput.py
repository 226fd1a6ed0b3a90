"""Goodput: the highest offered rate at which 95 of 100 requests get their images within a latency bound, by server.

A request that is refused, lost or late counts against the server. The bound is a multiple of the latency of an idle server
of ours. All servers get the same arrival patterns and the same requests; each rate is a point of the plot.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.client import Answer, closed_loop, open_loop, percentile, share_within, summary
from serving.plan import Bench, LoadPlan, in_turn
from serving.process import Server
from serving.traffic import mixed, poisson_times, with_keys

Row = dict[str, Any]
GOOD_SHARE = 0.95
_SETTLED_WITHIN_S = 60.0
_SHARES = {"p50": 0.5, "p95": GOOD_SHARE, "p99": 0.99}


@dataclass
class RateSearch:
    """Bisection between rates that held the bound and rates that did not."""

    highest_guess: float
    held: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)

    @property
    def found(self) -> float:
        """The highest rate that held; 0 when none did."""
        return max(self.held, default=0.0)

    def next_rate(self) -> float:
        """Half-way to the lowest failed rate above the found one, or higher while there is none."""
        above = [rate for rate in self.failed if rate > self.found]
        if above:
            return (self.found + min(above)) / 2
        return max(self.highest_guess, 1.5 * self.found)

    def observe(self, rate: float, *, is_held: bool) -> None:
        (self.held if is_held else self.failed).append(rate)


def goodput(bench: Bench, calibration: Row) -> Row:
    """Goodput of our server, and of stock if it is among the servers."""
    plan, ours = bench.plan, bench.ours
    kinds: list[str] = [ours.kind, *(kind for kind in bench.servers if kind == "stock")]
    servers = calibration["servers"]
    bound_s = plan.bound_factor * servers[ours.kind]["unloaded_s"]["p95"]
    points: list[Row] = []
    tuned = tune(bench.servers["stock"], servers["stock"], plan, bound_s) if "stock" in kinds else None
    searches = {kind: RateSearch(1.2 * servers[kind]["requests_per_s"]) for kind in kinds}

    def try_rate(kind: str, rate: float, seed: int) -> Row:
        point = probe(bench.servers[kind], rate, seed=seed, duration_s=plan.probe_s, bound_s=bound_s)
        points.append(point)
        return point

    for number, share in enumerate(plan.ladder):
        for kind in in_turn(kinds, number):
            rate = share * servers[kind]["requests_per_s"]
            searches[kind].observe(rate, is_held=try_rate(kind, rate, seed=200)["is_held"])
    for number in range(plan.bisections):
        for kind in in_turn(kinds, number):
            search = searches[kind]
            rate = search.next_rate()
            search.observe(rate, is_held=try_rate(kind, rate, seed=200)["is_held"])
    confirmed: dict[str, list[Row]] = {kind: [] for kind in kinds}
    for number in range(plan.confirmations):
        for kind in in_turn(kinds, number):
            if found := searches[kind].found:
                confirmed[kind].append(try_rate(kind, found, seed=300 + number))
    found_rates = {kind: searches[kind].found for kind in kinds}
    return {
        "bound_s": bound_s,
        "good_share": GOOD_SHARE,
        "found_rates": found_rates,
        "ratio": found_rates[ours.kind] / found_rates["stock"] if found_rates.get("stock") else None,
        "confirmed": {kind: [_brief(row) for row in rows] for kind, rows in confirmed.items()},
        "stock_tuning": tuned,
        "points": points,
    }


def probe(server: Server, rate: float, *, seed: int, duration_s: float, bound_s: float) -> Row:
    """Measures one offered rate."""
    times_s = poisson_times(rate, duration_s, seed=seed)
    requests = with_keys(mixed(len(times_s), seed=seed), server.keys)
    # A client disconnects after four times the bound.
    run = asyncio.run(open_loop(server.address, requests, times_s, timeout_s=4 * bound_s))
    settled_after_s = settle(server, bound_s)
    share = share_within(run.answers, bound_s) if run.answers else 1.0
    return {
        "server": server.kind,
        "rate": rate,
        "offered_per_s": len(times_s) / duration_s,
        "share_within": share,
        "good_per_s": share * len(times_s) / duration_s,
        "is_held": share >= GOOD_SHARE,
        "settled_after_s": settled_after_s,
        "latency_of_all_s": {name: _of_all(run.answers, share) for name, share in _SHARES.items()},
        **summary(run),
    }


def _of_all(answers: Sequence[Answer], share: float) -> float | None:
    """A percentile of the latency, infinite without an image; None if the percentile is infinite."""
    found = percentile([one.latency_s for one in answers], share) if answers else math.inf
    return found if math.isfinite(found) else None


def settle(server: Server, bound_s: float) -> float | None:
    """Waits until the server is idle again: a small request is answered within the bound, twice in a row.

    Returns:
        Seconds; None if it was still busy a minute after its last request.
    """
    started_s, quick = time.monotonic(), 0
    small = with_keys(mixed(1, seed=4, sizes=(1,)), server.keys)
    while quick < 2:
        if time.monotonic() - started_s > _SETTLED_WITHIN_S:
            return None
        (answer,) = asyncio.run(closed_loop(server.address, small, concurrency=1)).answers
        quick = quick + 1 if answer.latency_s < bound_s else 0
    return time.monotonic() - started_s


def tune(server: Server, calibrated: Row, plan: LoadPlan, bound_s: float) -> Row:
    """Tunes the stock server's batch size and wait for the most requests within the bound near its throughput."""
    rate, tried = 0.75 * calibrated["requests_per_s"], []
    choices = (
        [(2, 0.01), (4, 0.01), (8, 0.01), (16, 0.01), (4, 0.05)] if plan.bisections > 1 else [(4, 0.01), (8, 0.01)]
    )
    for size, wait_s in choices:
        setting = {"max_batch_size": size, "batch_wait_timeout_s": wait_s}
        asyncio.run(post(server, "/tune", setting))
        point = probe(server, rate, seed=400, duration_s=plan.probe_s, bound_s=bound_s)
        tried.append(setting | _brief(point))
    best = max(tried, key=lambda row: (row["share_within"], -(row["p95_s"] or math.inf)))
    chosen = {name: best[name] for name in ("max_batch_size", "batch_wait_timeout_s")}
    asyncio.run(post(server, "/tune", chosen))
    return {"rate": rate, "chosen": chosen, "tried": tried}


async def post(server: Server, path: str, body: Row) -> None:
    """Posts JSON to a path of a server."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.post(server.address + path, json=body) as reply:
        reply.raise_for_status()


def _brief(point: Row) -> Row:
    p95_s = point["latency_of_all_s"]["p95"]
    return {
        "rate": point["rate"],
        "share_within": point["share_within"],
        "good_per_s": point["good_per_s"],
        "p95_s": p95_s,
    }


def rates_of(points: Sequence[Row], kind: str) -> list[Row]:
    """A server's points by ascending rate."""
    return sorted((point for point in points if point["server"] == kind), key=lambda point: float(point["rate"]))
