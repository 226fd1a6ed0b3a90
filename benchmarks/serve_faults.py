"""Kills parts of a running server under load, and counts what its clients lost.

    python benchmarks/serve_faults.py --model models/garments --out benchmarks/results/serve_faults
    python benchmarks/serve_faults.py --kills 2 --only workers,drain

    workers      SIGKILL of one of two, again and again                      bar: 0 lost, every byte as ever
    edges        SIGKILL of one of two                                       bar: 0 lost
    controller   SIGKILL of Ray Serve's controller                           bar: 0 lost
    proxy        SIGKILL of the only proxy: seconds until it answers again   bar: 8
    update       every process replaced by one with other settings           bar: 0 lost
    scaling      two workers to one; then by the autoscaler to two and back  bar: 0 lost
    drain        SIGTERM: what was taken on is finished                      bar: 0 lost, exit code 0

Requests come without a pause (closed loop). Each answer's pixels are compared with the pipeline's, and its bytes with
those of every other answer to the same request. A request is lost when its client got anything but its picture or, at
once, the word that the queue is full; nothing is repeated by the client. Of 0 lost of N is known that fewer than 3 in N are lost (at 95 %).

The last line is one JSON document.
"""

import argparse
import asyncio
import http.client
import json
import os
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

import psutil  # type: ignore[import-untyped]
import torch
from machine_facts import hardware_name, print_document, slug
from sampling.plan import write_random_model
from serving.client import served_model
from serving.deployer import operator_environment
from serving.fault_load import Seen, pipeline_pictures, steady_load
from serving.process import Server, end_on_sigterm, serving
from serving.traffic import Asked, mixed

from engine.facts import facts
from engine.files import write_json

_NUM_DIFFERENT = 24
_BACK_WITHIN_S = 120.0
_PROXY_BAR_S = 8.0
Row = dict[str, Any]


@dataclass
class Scene:
    """The server under test, and what is asked of it."""

    server: Server
    arguments: Row
    asked: list[Asked]
    expected: dict[int, str]
    concurrency: int
    chance: random.Random

    def load(self, concurrency: int | None = None) -> Any:
        return steady_load(self.server.address, self.asked, self.expected, concurrency=concurrency or self.concurrency)

    def named(self, title: str) -> list[psutil.Process]:
        """Processes of the server by the title that Ray gives them."""
        found = []
        for process in self.server.processes():
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        return self.named("ServeReplica:kodalle:Worker")

    def ready_workers(self) -> int:
        """Workers that run and have reported: the last part of their names is their process id."""
        text = _get(self.server, "/metrics")
        reported = {int(pid) for pid in re.findall(r'^kodalle_slots\{replica="worker-.*-(\d+)"\}', text, re.MULTILINE)}
        return len(reported & {one.pid for one in self.workers()})

    def deploy(self, **changed: Any) -> float:
        """Deploys with other arguments; seconds until it runs so."""
        (raylet,) = self.named("raylet/raylet")
        told = subprocess.run(
            [sys.executable, "-m", "serving.deployer", json.dumps(self.arguments | changed)],
            env=operator_environment(raylet),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        return float(json.loads(told.stdout.splitlines()[-1])["seconds"])


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    document: Row = {"benchmark": "serve_faults", **facts(torch.device("cpu"))}
    document["config"] = {
        "workers": 2,
        "edges": 2,
        "requests_in_flight": arguments.concurrency,
        "candidates_a_request": arguments.candidates,
        "kills": arguments.kills,
    }
    with tempfile.TemporaryDirectory(prefix="serve-faults-") as folder:
        model = (arguments.model or Path(folder, "model")).resolve()
        if arguments.model is None:
            write_random_model(model, tiny=True)
        asked = mixed(_NUM_DIFFERENT, seed=5, sizes=(arguments.candidates,))
        expected = pipeline_pictures(model, asked)
        served = {"model": str(model), "num_workers": 2, "num_api_servers": 2, "num_slots": 32, "cpus_per_worker": 0.5}
        with serving("ray", served) as server:
            scene = Scene(server, served, asked, expected, arguments.concurrency, random.Random(1))
            document["config"]["model"] = asyncio.run(served_model(server.address))
            document["phases"] = _run(scene, arguments)
    document["hardware"]["load_after"] = round(os.getloadavg()[0], 2)
    document["is_met"] = all(row["is_met"] for row in document["phases"].values())
    if arguments.out is not None:
        write_json(arguments.out / f"{slug(hardware_name(document))}.json", document)
    print_document(document)
    return 0 if document["is_met"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one of random weights)")
    parser.add_argument("--kills", type=int, default=20, help="of workers; of everything else a quarter, at least 5")
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--only", default=",".join(PHASES), help="phases, in this order; drain ends the server")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - PHASES.keys()
    if unknown:
        parser.error(f"no such phase: {', '.join(sorted(unknown))}")
    return arguments


def _run(scene: Scene, arguments: argparse.Namespace) -> Row:
    rows: Row = {}
    for name in arguments.only.split(","):
        begun = time.monotonic()
        kills = arguments.kills if name == "workers" else max(min(5, arguments.kills), arguments.kills // 4)
        rows[name] = PHASES[name](scene, kills) | {"seconds": time.monotonic() - begun}
        print(
            f"{name:10} {'as wanted' if rows[name]['is_met'] else 'NOT AS WANTED'}  {json.dumps(rows[name])}",
            flush=True,
        )
    return rows


# ----------------------------------------------------------------------------------------------------------- the faults


def workers(scene: Scene, kills: int) -> Row:
    reruns = scene.server.metric("kodalle_reruns_total")
    back_s = []
    with scene.load() as seen:
        for _ in range(kills):
            time.sleep(scene.chance.uniform(0.5, 1.5))
            back_s.append(
                _kill_and_wait(scene, scene.chance.choice(scene.workers()), lambda: scene.ready_workers() == 2)
            )
    # Edges' counts start anew when they do: none dies here.
    num_reruns = scene.server.metric("kodalle_reruns_total") - reruns
    row = {"kills": kills, "reruns": num_reruns, "back_s": _spread(back_s)} | _judged(seen)
    return row | {"is_met": row["is_met"] and num_reruns > 0}


def api_servers(scene: Scene, kills: int) -> Row:
    title, back_s = "ServeReplica:kodalle:Edge", []
    with scene.load() as seen:
        for _ in range(kills):
            time.sleep(scene.chance.uniform(0.5, 1.5))
            victim = scene.chance.choice(scene.named(title))
            back_s.append(_kill_and_wait(scene, victim, lambda: len(scene.named(title)) == 2))
            time.sleep(3.0)  # until the new one takes requests
    return {"kills": kills, "back_s": _spread(back_s)} | _judged(seen)


def controller(scene: Scene, kills: int) -> Row:
    back_s = []
    with scene.load() as seen:
        for _ in range(kills):
            time.sleep(scene.chance.uniform(0.5, 1.5))
            (victim,) = scene.named("ServeController")
            back_s.append(_kill_and_wait(scene, victim, lambda: len(scene.named("ServeController")) == 1))
            time.sleep(3.0)
    return {"kills": kills, "back_s": _spread(back_s)} | _judged(seen)


def proxy(scene: Scene, kills: int) -> Row:
    """What it was passing on is lost with it: clients repeat it themselves. What counts is for how long nobody answers."""
    outages_s = []
    with scene.load() as seen:
        for _ in range(kills):
            time.sleep(2.0)
            (victim,) = scene.named("ProxyActor")
            outages_s.append(_kill_and_wait(scene, victim, lambda: "ok" in _get(scene.server, "/healthz")))
    spread = _spread(outages_s)
    row = {"kills": kills, "outage_s": spread} | _judged(seen)
    return row | {"is_met": spread["median"] <= _PROXY_BAR_S and not row["wrong_pixels"]}


def update(scene: Scene, _: int) -> Row:
    took_s = []
    with scene.load() as seen:
        for deadline_s in (119.0, 120.0):
            before = {one.pid for one in scene.workers()}
            took_s.append(scene.deploy(deadline_s=deadline_s))
            assert not before & {one.pid for one in scene.workers()}, "every worker is another process"
    return {"updates": len(took_s), "update_s": _spread(took_s)} | _judged(seen)


def scaling(scene: Scene, _: int) -> Row:
    one = {"num_workers": 1, "max_workers": 2, "scale_up_after_s": 2.0, "scale_down_after_s": 5.0}
    with scene.load() as seen:
        scene.deploy(num_workers=1)
        fewer_s = _wait(lambda: len(scene.workers()) == 1)
    scene.deploy(**one)
    with scene.load(4 * scene.concurrency) as busy:
        up_s = _wait(lambda: scene.ready_workers() == 2)
    with scene.load(1) as calm:
        down_s = _wait(lambda: len(scene.workers()) == 1)
    scene.deploy()
    _wait(lambda: scene.ready_workers() == 2)
    all_seen = Seen(seen.outcomes + busy.outcomes + calm.outcomes, seen.files)
    for other in (busy, calm):
        for number, files in other.files.items():
            all_seen.files.setdefault(number, set()).update(files)
    return {"two_to_one_s": fewer_s, "scaled_up_after_s": up_s, "scaled_down_after_s": down_s} | _judged(all_seen)


def drain(scene: Scene, _: int) -> Row:
    (root, *_others) = scene.server.processes()
    with scene.load() as seen:
        time.sleep(2.0)
        told_s = time.monotonic()
        root.terminate()
        code = scene.server._process.wait(timeout=120)
        ended_s = time.monotonic()
    taken_on = Seen([one for one in seen.outcomes if one.sent_s < told_s - 0.5], seen.files)
    later = Seen([one for one in seen.outcomes if one.sent_s >= told_s - 0.5])
    in_flight = sum(one.ended_s > told_s for one in taken_on.outcomes)
    row: Row = {"exit_code": code, "ended_after_s": ended_s - told_s, "in_flight_when_told": in_flight}
    row |= {"later": later.row()["lost"]} | _judged(taken_on)
    return row | {"is_met": row["is_met"] and code == 0 and in_flight > 0}


PHASES: dict[str, Callable[[Scene, int], Row]] = {
    "workers": workers,
    "edges": api_servers,
    "controller": controller,
    "proxy": proxy,
    "update": update,
    "scaling": scaling,
    "drain": drain,
}


def _kill_and_wait(scene: Scene, victim: psutil.Process, is_back: Callable[[], bool]) -> float:
    victim.kill()
    begun = time.monotonic()
    psutil.wait_procs([victim], timeout=10)
    while not is_back():
        scene.server.check()
        if time.monotonic() - begun > _BACK_WITHIN_S:
            raise TimeoutError(f"not back within {_BACK_WITHIN_S:g} s")
        time.sleep(0.02)
    return time.monotonic() - begun


def _wait(is_true: Callable[[], bool]) -> float:
    begun = time.monotonic()
    while not is_true():
        if time.monotonic() - begun > _BACK_WITHIN_S:
            raise TimeoutError
        time.sleep(0.1)
    return time.monotonic() - begun


def _get(server: Server, path: str) -> str:
    """A body; empty where nobody answers."""
    with suppress(OSError, http.client.HTTPException):
        return server.get(path, timeout_s=5)
    return ""


def _nothing_lost(seen: Seen) -> bool:
    row = seen.row()
    return bool(row["requests"]) and not (row["lost"] or row["wrong_pixels"] or row["requests_with_two_files"])


def _judged(seen: Seen) -> Row:
    return seen.row() | {"is_met": _nothing_lost(seen)}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


if __name__ == "__main__":
    sys.exit(main())
