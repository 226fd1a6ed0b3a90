"""Capacity in virtual time: many workers and clients, with the schedulers and the autoscaling policy that serve.

    python benchmarks/serve_simulation.py --out benchmarks/results/serve_simulation
    python benchmarks/serve_simulation.py --workers 10 --clients 1000 --minutes 5

Real are the schedulers (serve/scheduling/scheduler.py), one a worker: their queues, admission, deadlines and Retry-After; the
autoscaling policy (serve/cluster/autoscaling.py); and the times, which a stored run of benchmarks/sample_speed.py measured: a
decoder step at 1 and 16 images, linear in between and beyond, and prefill and what follows each image, which share a worker's
cores with the steps and are spread over them. Modelled are Ray's routing (the shorter of two queues picked at random, one more try where that one is full), the
re-run of a dead worker's requests, clients that repeat a refused request twice after its Retry-After, as OpenAI's do, and hang up.
HTTP, Ray's proxies and the network are not in it: what they bear is measured by benchmarks/serve_load.py.

A request's time is from its first arrival, refusals included, to its last image. The last line is one JSON document.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from machine_facts import REPOSITORY, print_document, stored_path

from engine.facts import facts
from engine.files import write_json
from serve.cluster.autoscaling import SEQUENCES, SLOTS, SlotsPolicy
from serve.cluster.rerun import MAX_DEATHS
from serve.scheduling.scheduler import Scheduler
from serve.scheduling.tickets import Overloaded, Ticket

STEP_TIMES = REPOSITORY / "benchmarks/results/sample_speed/2-cores-of-intel-xeon-processor-2.50ghz.json"
_STEPS = 256
_SIZES = ((1, 0.2), (4, 0.5), (8, 0.2), (16, 0.1))  # candidates of a request and their shares
_MEAN_SIZE = sum(size * share for size, share in _SIZES)
_KEYS = (("studio", 0.5), ("shop", 0.25), ("search", 0.15), ("lab", 0.1))
_MAX_RETRIES = 2
_HANG_UP_SHARE, _PATIENCE_S = 0.03, 20.0
_WORKER_LIFE_S, _RESTART_S, _START_S = 3600.0, 60.0, 60.0
_SCALE_EVERY_S, _SCALE_UP_AFTER_S, _TARGET_SHARE = 1.0, 10.0, 0.75
_BURST_S, _BURST_EVERY_S, _BURST_FACTOR = 10.0, 60.0, 4.0
Row = dict[str, Any]
Picked = TypeVar("Picked", int, str)


@dataclass(frozen=True)
class Times:
    """Seconds of a worker's work."""

    first_step: float
    more_step: float  # of each further sequence
    prefill: float
    finish: float  # after an image's last token

    def step(self, slots: int) -> float:
        """Of a decoder step and the prefill and postprocessing that share the cores with it, spread over all steps."""
        beside = (self.finish + self.prefill / _MEAN_SIZE) / _STEPS
        return self.first_step + self.more_step * (slots - 1) + beside * slots

    def images_per_s(self, num_slots: int) -> float:
        """Of a worker whose slots are always taken."""
        return num_slots / (_STEPS * self.step(num_slots))


@dataclass(frozen=True)
class Plan:
    """One scenario; `load` is the share of what all workers could generate that is requested."""

    name: str
    load: float
    is_bursty: bool = False
    deaths: bool = False
    flood: float = 0.0  # share of the load that comes from one further key on top
    workers: int = 0  # 0: all
    scales_to: int = 0  # with autoscaling
    load_from_s: tuple[float, float] | None = None  # (time, load) of a jump
    most_minutes: float = (
        math.inf
    )  # overload shows itself soon, and each refusal costs the simulation as much as an answer


@dataclass
class Request:
    """A request of a client, and what has become of it."""

    name: str
    key: str
    size: int
    arrived: float
    deadline: float
    gives_up: float | None
    tries: int = 0
    deaths: int = 0
    left: int = 0
    worker: "Worker | None" = None
    outcome: str = ""
    took_s: float = 0.0  # if answered


@dataclass(eq=False)
class Worker:
    """A scheduler and a decoder whose steps take the measured time."""

    scheduler: Scheduler
    times: Times
    at: float  # when the latest step ended
    is_alive: bool = True
    running: dict[tuple[str, int], int] = field(default_factory=dict)  # steps left
    version: int = 0

    def advance(self, now: float) -> list[tuple[float, str]]:
        """Steps until `now`. Returns (time, request) of each finished sequence."""
        finished: list[tuple[float, str]] = []
        while self.running:
            slots = len(self.running)
            step_s, most = self.times.step(slots), min(self.running.values())
            count = min(most, int((now - self.at) / step_s + 1e-9))
            if count < 1:
                return finished
            self.at += count * step_s
            for _ in range(count):
                self.scheduler.observe_step(seconds=step_s, slots=slots)
            for place in list(self.running):
                self.running[place] -= count
                if not self.running[place]:
                    del self.running[place]
                    self.scheduler.sequence_finished(*place)
                    finished.append((self.at, place[0]))
            self.grant()
        self.at = max(self.at, now)
        return finished

    def grant(self) -> None:
        for grant in self.scheduler.grant(now=self.at):
            self.running[grant.request_id, grant.candidate] = _STEPS

    def cancel(self, name: str) -> None:
        for candidate in self.scheduler.cancel(name):
            del self.running[name, candidate]
        self.grant()

    @property
    def next_end(self) -> float:
        return self.at + min(self.running.values()) * self.times.step(len(self.running))


class Simulation:
    """One scenario from its first to its last event."""

    def __init__(self, plan: Plan, arguments: argparse.Namespace, times: Times) -> None:
        self.plan, self.arguments, self.times = plan, arguments, times
        self.random = random.Random(plan.name)
        self.events: list[tuple[float, int, str, Any]] = []
        self.numbers = itertools.count()
        self.workers: list[Worker] = []
        self.requests: dict[str, Request] = {}
        self.counts: Counter[str] = Counter()
        self.sizes: list[tuple[float, int]] = []  # of the cluster, with autoscaling
        self.wanted_since: float | None = None  # more workers, by the policy
        self.num_starting = 0
        self.seconds = min(arguments.minutes, plan.most_minutes) * 60.0
        for _ in range(plan.workers or arguments.workers):
            self._start_worker(0.0)

    def run(self) -> Row:
        self._arrivals()
        if self.plan.scales_to:
            self._at(0.0, "scale", None)
        while self.events:
            now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_on_{kind}")(now, what)
        return self._row()

    def _at(self, when: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), kind, what))

    def _rate(self, now: float) -> float:
        """Requests a second of all clients."""
        plan = self.plan
        load = plan.load
        if plan.load_from_s is not None and now >= plan.load_from_s[0]:
            load = plan.load_from_s[1]
        if plan.is_bursty:
            share = _BURST_S / _BURST_EVERY_S
            in_burst = now % _BURST_EVERY_S < _BURST_S
            load *= _BURST_FACTOR if in_burst else (1 - share * _BURST_FACTOR) / (1 - share)
        num_workers = plan.scales_to or self.arguments.workers
        return load * num_workers * self.times.images_per_s(self.arguments.slots) / _MEAN_SIZE

    def _arrivals(self) -> None:
        most = max(self._rate(second / 2) for second in range(int(2 * self.seconds)))
        for flooding in (False, True) if self.plan.flood else (False,):
            now, factor = 0.0, self.plan.flood if flooding else 1.0
            while (now := now + self.random.expovariate(most * factor)) < self.seconds:
                if self.random.random() * most > self._rate(now):
                    continue  # thinned
                size = _pick(_SIZES, self.random)
                key = "flood" if flooding else _pick(_KEYS, self.random)
                hangs_up = self.random.random() < _HANG_UP_SHARE
                patience = now + self.random.expovariate(1 / _PATIENCE_S) if hangs_up else None
                name = f"r{len(self.requests)}"
                request = Request(name, key, size, now, now + self.arguments.deadline_s, patience)
                self.requests[name] = request
                self._at(now, "arrival", request)

    def _on_arrival(self, now: float, request: Request) -> None:
        """A request, its repetition by the client, or its re-run."""
        alive = [worker for worker in self.workers if worker.is_alive]
        two = self.random.sample(alive, min(2, len(alive)))
        two.sort(key=lambda worker: worker.scheduler.num_active + worker.scheduler.num_waiting)
        refusal: Overloaded | None = None
        for worker in two:
            self._advance(worker, now)
            ticket = Ticket(request.name, request.key, request.size, 1, _STEPS, request.deadline)
            try:
                worker.scheduler.submit(ticket, now=now)
            except Overloaded as overloaded:
                refusal = overloaded
                continue
            request.worker, request.left = worker, request.size
            worker.grant()
            self._plan_end(worker)
            if request.gives_up is not None:
                self._at(request.gives_up, "hangup", request)
            return
        if request.deaths and now + 0.5 < request.deadline:  # its worker died: sent until one has room
            self._at(now + 0.5, "arrival", request)
        elif refusal is not None and request.tries < _MAX_RETRIES:
            request.tries += 1
            request.deadline += refusal.retry_after_s  # a new request, whose deadline counts from its own arrival
            self._at(now + refusal.retry_after_s, "arrival", request)
        else:
            request.outcome = "refused"

    def _on_end(self, now: float, what: tuple[Worker, int]) -> None:
        worker, version = what
        if worker.is_alive and worker.version == version:
            self._advance(worker, now)
            self._plan_end(worker)

    def _on_hangup(self, now: float, request: Request) -> None:
        worker = request.worker
        if worker is not None and not request.outcome:
            self._advance(worker, now)
            if not request.outcome:
                request.outcome = "hung up"
                worker.cancel(request.name)
                self._plan_end(worker)

    def _on_death(self, now: float, worker: Worker) -> None:
        self._advance(worker, now)
        worker.is_alive = False
        self.counts["deaths"] += 1
        for request in self.requests.values():
            if request.worker is worker and not request.outcome:
                request.worker, request.deaths = None, request.deaths + 1
                if request.deaths >= MAX_DEATHS:
                    request.outcome = "failed"
                    continue
                self.counts["reruns"] += 1
                self._at(now, "arrival", request)
        self._at(now + _RESTART_S, "start", None)

    def _on_start(self, now: float, _: Any) -> None:
        self.num_starting = max(0, self.num_starting - 1)
        self._start_worker(now)

    def _on_scale(self, now: float, _: Any) -> None:
        """Ray's controller: the policy's wish counts once it has lasted."""
        for worker in self.workers:
            self._advance(worker, now)
            self._plan_end(worker)
        metrics = {
            SEQUENCES: {n: one.scheduler.slots_in_use + one.scheduler.queued_sequences for n, one in self._named()},
            SLOTS: {n: one.scheduler.num_slots for n, one in self._named()},
        }
        size = len(self.workers) + self.num_starting
        context = SimpleNamespace(
            current_num_replicas=len(self.workers), target_num_replicas=size, running_replicas=range(len(self.workers)),
            aggregated_metrics=metrics,
        )  # fmt: skip
        wanted = min(self.plan.scales_to, math.ceil(SlotsPolicy(_TARGET_SHARE)(context)[0]))
        if wanted <= size:
            self.wanted_since = None
        elif self.wanted_since is None:
            self.wanted_since = now
        elif now - self.wanted_since >= _SCALE_UP_AFTER_S:
            self.num_starting += wanted - size
            self.wanted_since = None
            for _number in range(wanted - size):
                self._at(now + _START_S, "start", None)
        self.sizes.append((now, len(self.workers)))
        if now < self.seconds:
            self._at(now + _SCALE_EVERY_S, "scale", None)

    def _named(self) -> list[tuple[int, Worker]]:
        return list(enumerate(self.workers))

    def _start_worker(self, now: float) -> None:
        arguments = self.arguments
        scheduler = Scheduler(num_slots=arguments.slots, max_queued_sequences=arguments.queue)
        worker = Worker(scheduler, self.times, now)
        self.workers.append(worker)
        if self.plan.deaths:
            dies = now + self.random.expovariate(1 / _WORKER_LIFE_S)
            if dies < self.seconds:
                self._at(dies, "death", worker)

    def _advance(self, worker: Worker, now: float) -> None:
        if not worker.is_alive:
            return
        for when, name in worker.advance(now):
            request = self.requests[name]
            request.left -= 1
            if not request.left:
                request.outcome = "answered"
                self.counts["images"] += request.size * (when <= self.seconds)
                request.took_s = when - request.arrived
        for name in worker.scheduler.overdue(now=worker.at):
            self.requests[name].outcome = "late"
            worker.cancel(name)

    def _plan_end(self, worker: Worker) -> None:
        worker.version += 1
        if worker.is_alive and worker.running:
            self._at(max(worker.next_end, worker.at) + 1e-9, "end", (worker, worker.version))

    def _row(self) -> Row:
        plan, done = self.plan, list(self.requests.values())
        outcomes = Counter(request.outcome or "unanswered" for request in done)
        row: Row = {"scenario": plan.name, "load": plan.load, "workers": plan.workers or self.arguments.workers}
        row |= {"requests": len(done), "requests_per_s": round(len(done) / self.seconds, 3)}
        row |= {
            "outcomes": dict(sorted(outcomes.items())),
            "deaths": self.counts["deaths"],
            "reruns": self.counts["reruns"],
        }
        row["answered_share"] = round(outcomes["answered"] / max(1, len(done)), 4)
        row["repeated_share"] = round(sum(request.tries > 0 for request in done) / max(1, len(done)), 4)
        row["images_per_s"] = round(self.counts["images"] / self.seconds, 2)
        row["seconds"] = _quantiles([request.took_s for request in done if request.outcome == "answered"])
        row["keys"] = _keys(done)
        shares = [one["answered_share"] for name, one in row["keys"].items() if name != "flood"]
        row["fairness_jain"] = round(sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares) or 1), 4)
        if plan.scales_to:
            row["autoscaling"] = self._lag()
        return row

    def _lag(self) -> Row:
        assert self.plan.load_from_s is not None
        since, most = self.plan.load_from_s[0], max(size for _, size in self.sizes)
        reached = next(now for now, size in self.sizes if size == most)
        refused = [one for one in self.requests.values() if one.outcome == "refused" and one.arrived >= since]
        last = max((one.arrived for one in refused), default=since)
        return {
            "jump_at_s": since, "workers_after": most, "all_after_s": round(reached - since, 1),
            "refused": len(refused), "last_refused_after_s": round(last - since, 1),
        }  # fmt: skip


def _pick(shares: Sequence[tuple[Picked, float]], generator: random.Random) -> Picked:
    values, weights = [value for value, _ in shares], [share for _, share in shares]
    return generator.choices(values, weights)[0]


def _keys(requests: list[Request]) -> Row:
    by_key: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        by_key[request.key].append(request)
    return {
        key: {
            "requests": len(own),
            "answered_share": round(sum(one.outcome == "answered" for one in own) / len(own), 4),
            "seconds": _quantiles([one.took_s for one in own if one.outcome == "answered"]),
        }
        for key, own in sorted(by_key.items())
    }


def _quantiles(values: list[float]) -> Row:
    ordered = sorted(values)
    picked = (
        {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
        if values
        else {}
    )
    return {name: round(value, 2) for name, value in picked.items()}


def read_times(path: Path, variant: str) -> Times:
    """Of a document of benchmarks/sample_speed.py."""
    rows = {
        row["images"]: row["phases_s"]
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if (row["what"], row["variant"]) == ("ours", variant)
    }
    one, many = rows[1], rows[16]
    more = (many["decode"] - one["decode"]) / 15
    finish = sum(many[phase] for phase in ("vqgan", "ranking", "encoding")) / 16
    return Times(one["decode"] / _STEPS, more / _STEPS, one["prefill"], finish)


def plans(workers: int) -> list[Plan]:
    """Poisson and bursty at rising load, dying workers, one flooding key, ten times the load, a jump under autoscaling."""
    jump = Plan(
        "load jumps fivefold, autoscaling",
        0.15,
        workers=max(1, workers // 5),
        scales_to=workers,
        load_from_s=(120.0, 0.75),
    )
    return [
        *(Plan(f"Poisson, load {load:g}", load) for load in (0.3, 0.5, 0.7, 0.8, 0.9)),
        Plan("bursty, load 0.5", 0.5, is_bursty=True),
        Plan("bursty, load 0.7", 0.7, is_bursty=True),
        Plan("Poisson, load 0.7, workers die", 0.7, deaths=True),
        Plan("Poisson, load 0.5, one more key with 2.0", 0.5, flood=4.0, most_minutes=4.0),
        Plan("Poisson, load 10", 10.0, most_minutes=1.5),
        jump,
    ]


def main() -> int:
    arguments = _arguments()
    times = read_times(arguments.times, arguments.variant)
    capacity = times.images_per_s(arguments.slots)
    document: Row = {"benchmark": "serve_simulation", **facts(torch.device("cpu"))}
    document["config"] = {
        "workers": arguments.workers, "clients": arguments.clients, "minutes": arguments.minutes, "slots": arguments.slots,
        "max_queued_sequences": arguments.queue, "deadline_s": arguments.deadline_s, "steps": _STEPS,
        "sizes": [list(one) for one in _SIZES], "keys": [list(one) for one in _KEYS], "variant": arguments.variant,
        "step_times": stored_path(arguments.times), "times_s": vars(times),
        "hang_up_share": _HANG_UP_SHARE, "worker_life_s": _WORKER_LIFE_S, "restart_s": _RESTART_S, "start_s": _START_S,
    }  # fmt: skip
    document["worker"] = {"images_per_s": round(capacity, 3), "requests_per_s": round(capacity / _MEAN_SIZE, 4)}
    document["rows"] = []
    for plan in plans(arguments.workers):
        started = time.process_time()
        row = Simulation(plan, arguments, times).run()
        row["processor_s"] = round(time.process_time() - started, 1)
        row["client_asks_every_s"] = round(arguments.clients / row["requests_per_s"], 1)
        document["rows"].append(row)
        if arguments.out is not None:  # so far
            write_json(arguments.out / f"{arguments.workers}-workers-{arguments.variant}.json", document)
        print(f"{plan.name}: {row['answered_share']:.1%} answered, {row['seconds']}", file=sys.stderr, flush=True)
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=15.0, help="of virtual time in which requests arrive")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--deadline-s", type=float, default=120.0)
    parser.add_argument("--times", type=Path, default=STEP_TIMES, help="document of benchmarks/sample_speed.py")
    parser.add_argument("--variant", default="int8", help="row of that document")
    parser.add_argument("--out", type=Path, help="folder for the document")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
