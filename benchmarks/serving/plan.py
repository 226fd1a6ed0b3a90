"""Sizes of the serving benchmark's parts, and the servers that they measure."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from serving.client import LoadRun, closed_loop
from serving.engine import Engine
from serving.process import Server
from serving.traffic import LoadRequest, mixed, with_keys

PARTS = ("saturation", "concurrency_one", "goodput", "sizes", "fairness", "overload")
GREEDY, MODEST = "greedy", "modest"  # ids of the two API keys


@dataclass(frozen=True)
class LoadPlan:
    """Sizes of all parts: `FULL` takes a quarter of an hour on two cores, `QUICK` checks that it runs."""

    rounds: int  # of turns of the servers
    requests: int  # of a saturated run
    concurrency: int  # of a saturated run: more sequences than slots
    single_requests: int  # one at a time
    probe_s: float  # of one offered rate
    ladder: tuple[float, ...]  # offered rates that are always probed, as shares of the throughput
    bisections: int
    confirmations: int  # of the rate that was found
    sizes_s: float
    fairness_s: float
    overload_s: float
    short_deadline_s: float  # of a second overloaded server
    overload_factor: float = 10.0
    bound_factor: float = 3.0  # times the unloaded p95: the latency bound of goodput


FULL = LoadPlan(
    rounds=4,
    requests=36,
    concurrency=24,
    single_requests=24,
    probe_s=20.0,
    ladder=(0.3, 0.6, 0.9, 1.1),
    bisections=4,
    confirmations=2,
    sizes_s=40.0,
    fairness_s=25.0,
    overload_s=6.0,
    short_deadline_s=5.0,
)
QUICK = LoadPlan(
    rounds=1,
    requests=9,
    concurrency=6,
    single_requests=3,
    probe_s=1.0,
    ladder=(0.5,),
    bisections=1,
    confirmations=1,
    sizes_s=1.0,
    fairness_s=1.5,
    overload_s=1.0,
    short_deadline_s=2.0,
)


@dataclass(frozen=True)
class Bench:
    """The systems under test: the engine alone, and servers of the same model, all running, used one at a time."""

    engine: Engine
    servers: dict[str, Server]  # by kind
    short_deadline: Server | None
    plan: LoadPlan

    @property
    def ours(self) -> Server:
        """Our server on Ray if it is measured, else the one without."""
        return self.servers.get("ray") or self.servers["direct"]


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The names, rotated by the round's number, so that none is always the first."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def load_fully(server: Server, requests: Sequence[LoadRequest], *, concurrency: int) -> LoadRun:
    """A saturated run; every request must be answered."""
    run = asyncio.run(closed_loop(server.address, with_keys(requests, server.keys), concurrency=concurrency))
    check_answered(server, run)
    return run


def warm_up(server: Server) -> None:
    """Sends first requests, which are slow: connections between processes, first batch sizes.

    Some may be refused by a short deadline.

    Raises:
        RuntimeError: the server does not generate.
    """
    several = with_keys(mixed(6, seed=99), server.keys)
    asyncio.run(closed_loop(server.address, several, concurrency=6))
    one = with_keys(mixed(1, seed=98, sizes=(1,)), server.keys)
    check_answered(server, asyncio.run(closed_loop(server.address, one, concurrency=1)))


def check_answered(server: Server, run: LoadRun) -> None:
    """Raises RuntimeError if any request was not answered."""
    lost = [one for one in run.answers if one.status != 200]
    if lost:
        raise RuntimeError(f"{server.kind}: {len(lost)} of {len(run.answers)} not answered: {lost[0]}")
