"""Fault injection: kills processes of a running server under load, and counts lost requests.

    python benchmarks/serve_faults.py --model models/garments --out benchmarks/results/serve_faults
    python benchmarks/serve_faults.py --kills 2 --only workers,drain

    workers      SIGKILL of one of two, again and again                      bar: 0 lost, no byte changed
    api_servers  SIGKILL of one of two                                       bar: 0 lost
    controller   SIGKILL of Ray Serve's controller                           bar: 0 lost
    proxy        SIGKILL of the only proxy: seconds until it answers again   bar: 8
    update       every process is replaced by one with other settings        bar: 0 lost
    scaling      two workers to one; then by the autoscaler to two and back  bar: 0 lost
    drain        SIGTERM: accepted requests are finished                     bar: 0 lost, exit code 0

Requests come without a pause (closed loop). Each response's pixels are compared with the pipeline's, and its bytes with
those of every other response to the same request. A request is lost when its client gets anything but its image or an
immediate refusal because of a full queue; clients do not retry. 0 lost of N means a loss rate below 3 / N (at 95 %).

The last line is one JSON document.
"""

import argparse
import asyncio
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from machine_facts import print_document, store_served
from sampling.plan import write_random_model
from serving.client import served_model
from serving.deployer import operator_environment
from serving.fault_load import Outcomes, pipeline_images, steady_load
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import LoadRequest, mixed

from engine.facts import facts

_NUM_DIFFERENT = 24
_BACK_WITHIN_S = 120.0
_PROXY_BAR_S = 8.0
Row = dict[str, Any]


@dataclass
class TestBed:
    """The server under test, and its load."""

    __test__ = False  # not a test class

    server: Server
    arguments: Row
    requests: list[LoadRequest]
    expected: dict[int, str]
    concurrency: int
    rng: random.Random

    def load(self, concurrency: int | None = None) -> Any:
        return steady_load(
            self.server.address, self.requests, self.expected, concurrency=concurrency or self.concurrency
        )

    def named(self, title: str) -> list[psutil.Process]:
        """The server's processes with a title that Ray sets."""
        found = []
        for process in self.server.processes():
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        return self.named("ServeReplica:kodalle:Worker")

    def ready_workers(self) -> int:
        """Number of running workers that have reported; the last part of their names is their process id."""
        text = _get(self.server, "/metrics")
        reported = {int(pid) for pid in re.findall(r'^kodalle_slots\{replica="worker-.*-(\d+)"\}', text, re.MULTILINE)}
        return len(reported & {one.pid for one in self.workers()})

    def deploy(self, **changed: Any) -> float:
        """Redeploys with other arguments; returns the seconds until the new deployment runs."""
        (raylet,) = self.named("raylet/raylet")
        done = subprocess.run(
            [sys.executable, "-m", "serving.deployer", json.dumps(self.arguments | changed)],
            env=operator_environment(raylet),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    document: Row = {"benchmark": "serve_faults", **facts(torch.device("cpu"))}
    document["config"] = {
        "workers": 2,
        "api_servers": 2,
        "requests_in_flight": arguments.concurrency,
        "candidates_per_request": arguments.candidates,
        "kills": arguments.kills,
    }
    with tempfile.TemporaryDirectory(prefix="serve-faults-") as folder:
        model = (arguments.model or Path(folder, "model")).resolve()
        if arguments.model is None:
            write_random_model(model, tiny=True)
        requests = mixed(_NUM_DIFFERENT, seed=5, sizes=(arguments.candidates,))
        expected = pipeline_images(model, requests)
        served = {"model": str(model), "num_workers": 2, "num_api_servers": 2, "num_slots": 32, "cpus_per_worker": 0.5}
        with serving("ray", served) as server:
            bed = TestBed(server, served, requests, expected, arguments.concurrency, random.Random(1))
            document["config"]["model"] = asyncio.run(served_model(server.address))
            document["phases"] = _run(bed, arguments)
    document["is_met"] = all(row["is_met"] for row in document["phases"].values())
    store_served(document, arguments.out)
    print_document(document)
    return 0 if document["is_met"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
    parser.add_argument("--kills", type=int, default=20, help="of workers; of other processes a quarter, at least 5")
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--only", default=",".join(PHASES), help="phases, in this order; drain ends the server")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - PHASES.keys()
    if unknown:
        parser.error(f"no such phase: {', '.join(sorted(unknown))}")
    return arguments


def _run(bed: TestBed, arguments: argparse.Namespace) -> Row:
    rows: Row = {}
    for name in arguments.only.split(","):
        started_s = time.monotonic()
        kills = arguments.kills if name == "workers" else max(min(5, arguments.kills), arguments.kills // 4)
        rows[name] = PHASES[name](bed, kills) | {"seconds": time.monotonic() - started_s}
        print(
            f"{name:10} {'met' if rows[name]['is_met'] else 'NOT MET'}  {json.dumps(rows[name])}",
            flush=True,
        )
    return rows


# ----------------------------------------------------------------------------------------------------------- the faults


def workers(bed: TestBed, kills: int) -> Row:
    reruns = bed.server.metric("kodalle_reruns_total")
    back_s = []
    with bed.load() as outcomes:
        for _ in range(kills):
            time.sleep(bed.rng.uniform(0.5, 1.5))
            back_s.append(_kill_and_wait(bed, bed.rng.choice(bed.workers()), lambda: bed.ready_workers() == 2))
    # API servers' counters restart with them: none dies here.
    num_reruns = bed.server.metric("kodalle_reruns_total") - reruns
    row = {"kills": kills, "reruns": num_reruns, "back_s": _spread(back_s)} | _with_verdict(outcomes)
    return row | {"is_met": row["is_met"] and num_reruns > 0}


def api_servers(bed: TestBed, kills: int) -> Row:
    title, back_s = "ServeReplica:kodalle:ApiServer", []
    with bed.load() as outcomes:
        for _ in range(kills):
            time.sleep(bed.rng.uniform(0.5, 1.5))
            victim = bed.rng.choice(bed.named(title))
            back_s.append(_kill_and_wait(bed, victim, lambda: len(bed.named(title)) == 2))
            time.sleep(3.0)  # until the new one accepts requests
    return {"kills": kills, "back_s": _spread(back_s)} | _with_verdict(outcomes)


def controller(bed: TestBed, kills: int) -> Row:
    back_s = []
    with bed.load() as outcomes:
        for _ in range(kills):
            time.sleep(bed.rng.uniform(0.5, 1.5))
            (victim,) = bed.named("ServeController")
            back_s.append(_kill_and_wait(bed, victim, lambda: len(bed.named("ServeController")) == 1))
            time.sleep(3.0)
    return {"kills": kills, "back_s": _spread(back_s)} | _with_verdict(outcomes)


def proxy(bed: TestBed, kills: int) -> Row:
    """A proxy's open requests are lost with it, and clients retry them. Measured is the time until it answers again."""
    outages_s = []
    with bed.load() as outcomes:
        for _ in range(kills):
            time.sleep(2.0)
            (victim,) = bed.named("ProxyActor")
            outages_s.append(_kill_and_wait(bed, victim, lambda: "ok" in _get(bed.server, "/healthz")))
    spread = _spread(outages_s)
    row = {"kills": kills, "outage_s": spread} | _with_verdict(outcomes)
    return row | {"is_met": spread["median"] <= _PROXY_BAR_S and not row["wrong_pixels"]}


def update(bed: TestBed, _: int) -> Row:
    took_s = []
    with bed.load() as outcomes:
        for deadline_s in (119.0, 120.0):
            before = {one.pid for one in bed.workers()}
            took_s.append(bed.deploy(deadline_s=deadline_s))
            assert not before & {one.pid for one in bed.workers()}, "every worker is another process"
    return {"updates": len(took_s), "update_s": _spread(took_s)} | _with_verdict(outcomes)


def scaling(bed: TestBed, _: int) -> Row:
    one = {"num_workers": 1, "max_workers": 2, "scale_up_after_s": 2.0, "scale_down_after_s": 5.0}
    with bed.load() as outcomes:
        bed.deploy(num_workers=1)
        fewer_s = _wait(lambda: len(bed.workers()) == 1)
    bed.deploy(**one)
    with bed.load(4 * bed.concurrency) as busy:
        up_s = _wait(lambda: bed.ready_workers() == 2)
    with bed.load(1) as calm:
        down_s = _wait(lambda: len(bed.workers()) == 1)
    bed.deploy()
    _wait(lambda: bed.ready_workers() == 2)
    all_outcomes = Outcomes(outcomes.all + busy.all + calm.all, outcomes.files)
    for other in (busy, calm):
        for number, files in other.files.items():
            all_outcomes.files.setdefault(number, set()).update(files)
    return {"two_to_one_s": fewer_s, "scaled_up_after_s": up_s, "scaled_down_after_s": down_s} | _with_verdict(
        all_outcomes
    )


def drain(bed: TestBed, _: int) -> Row:
    (root, *_others) = bed.server.processes()
    with bed.load() as outcomes:
        time.sleep(2.0)
        sigterm_s = time.monotonic()
        root.terminate()
        code = bed.server._process.wait(timeout=120)
        ended_s = time.monotonic()
    accepted = Outcomes([one for one in outcomes.all if one.sent_s < sigterm_s - 0.5], outcomes.files)
    later = Outcomes([one for one in outcomes.all if one.sent_s >= sigterm_s - 0.5])
    in_flight = sum(one.ended_s > sigterm_s for one in accepted.all)
    row: Row = {"exit_code": code, "ended_after_s": ended_s - sigterm_s, "in_flight_at_sigterm": in_flight}
    row |= {"later": later.row()["lost"]} | _with_verdict(accepted)
    return row | {"is_met": row["is_met"] and code == 0 and in_flight > 0}


PHASES: dict[str, Callable[[TestBed, int], Row]] = {
    "workers": workers,
    "api_servers": api_servers,
    "controller": controller,
    "proxy": proxy,
    "update": update,
    "scaling": scaling,
    "drain": drain,
}


def _kill_and_wait(bed: TestBed, victim: psutil.Process, is_back: Callable[[], bool]) -> float:
    victim.kill()
    started_s = time.monotonic()
    psutil.wait_procs([victim], timeout=10)
    while not is_back():
        bed.server.check()
        if time.monotonic() - started_s > _BACK_WITHIN_S:
            raise TimeoutError(f"not back within {_BACK_WITHIN_S:g} s")
        time.sleep(0.02)
    return time.monotonic() - started_s


def _wait(is_true: Callable[[], bool]) -> float:
    started_s = time.monotonic()
    while not is_true():
        if time.monotonic() - started_s > _BACK_WITHIN_S:
            raise TimeoutError
        time.sleep(0.1)
    return time.monotonic() - started_s


def _get(server: Server, path: str) -> str:
    """The body of GET `path`; empty without an answer."""
    with suppress(OSError, http.client.HTTPException):
        return server.get(path, timeout_s=5)
    return ""


def _nothing_lost(outcomes: Outcomes) -> bool:
    row = outcomes.row()
    return bool(row["requests"]) and not (row["lost"] or row["wrong_pixels"] or row["requests_with_two_files"])


def _with_verdict(outcomes: Outcomes) -> Row:
    return outcomes.row() | {"is_met": _nothing_lost(outcomes)}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


if __name__ == "__main__":
    sys.exit(main())
