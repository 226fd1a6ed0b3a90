"""Serving benchmark: our servers, the engine alone, and stock `@serve.batch` with the same model.

    python benchmarks/serve_load.py --model models/garments        everything: a quarter of an hour
    python benchmarks/serve_load.py --quick                                a tiny model, 90 seconds, to check that it runs
    python benchmarks/serve_load.py --published                            the published sizes, random weights
    python benchmarks/serve_load.py --only goodput --probe-s 10 --servers ray,stock

Servers: `direct` (ours in one process), `ray` (ours on Ray Serve), `stock` (serving/batch_baseline.py). All run on this
machine during the whole benchmark, beside the engine alone (serving/engine.py) and this client, and are used in turns,
because the machine's own speed varies. The CPU usage of the idle ones is measured and stored.

    saturation       requests per second over HTTP relative to the engine alone                 bar: 90 %
    concurrency_one  milliseconds that serving adds to a single request                        bar: 5 ms
    goodput          highest offered rate with 95 of 100 requests within a bound: ours / stock bar: 3
    sizes            p50, p95, p99 by number of candidates at 70 % of that rate
    fairness         latencies of a modest sender, alone and beside a greedy one
    overload         ten times the capacity: refusals within 100 ms, no admitted request times out

Prints tables and, as the last line, one JSON document, which is also stored with a plot:

    <out>/results/serve_load/<hardware>.json      <out>/plots/serve_load-<hardware>.png
"""

import argparse
import asyncio
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine_facts import kept_when_stopped, print_document, store_document
from sampling.plan import write_random_model
from serving.client import served_model
from serving.engine import engine
from serving.goodput import goodput
from serving.load_generator import fairness, overload, sizes
from serving.plan import FULL, GREEDY, MODEST, PARTS, QUICK, Bench, LoadPlan, warm_up
from serving.plot import plot
from serving.process import Server, ServerKind, end_on_sigterm, serving
from serving.report import bars, tables
from serving.speed import calibrate, concurrency_one, idle_cpu_shares, saturation

from engine.facts import facts

_DEMO = Path("models/garments")
_SERVERS: tuple[ServerKind, ...] = ("direct", "ray", "stock")
_DEADLINE_S = 120.0  # the server's default


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    plan = _plan(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document: dict[str, Any] = {
        "benchmark": "serve_load",
        **facts(device),
        "config": {
            "servers": arguments.servers,
            "plan": asdict(plan),
        },
    }
    with ExitStack() as stack:
        model = arguments.model or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-load-")), "tiny")
        if arguments.model is None:
            write_random_model(model, tiny=not arguments.published)
        bench = _start(stack, arguments, model, plan)
        ours = bench.ours
        document["config"]["model"] = asyncio.run(served_model(ours.address, key=next(iter(ours.keys), "")))
        with kept_when_stopped(document):
            _measure(bench, arguments.only, document)
    if "stopped" in document:
        _store(document, arguments)
        print_document(document)
        return 1
    document["bars"] = bars(document)
    document["hardware"]["load_after"] = round(os.getloadavg()[0], 2)
    _store(document, arguments)
    print(tables(document), end="\n\n")
    print_document(document)
    return 0


def _arguments() -> argparse.Namespace:
    def names(allowed: tuple[str, ...]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            unknown = [name for name in chosen if name not in allowed]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(allowed)}")
            return [name for name in allowed if name in chosen]

        return parse

    parser = argparse.ArgumentParser(description="Measures serving on this machine; see the file's head.")
    parser.add_argument("--model", type=Path, help=f"model folder (default: {_DEMO}, with --quick a tiny one)")
    parser.add_argument("--published", action="store_true", help="a model of the published sizes with random weights")
    parser.add_argument("--quick", action="store_true", help="few requests, to check that it runs")
    parser.add_argument("--servers", type=names(_SERVERS), default=list(_SERVERS), help=f"of {','.join(_SERVERS)}")
    parser.add_argument("--only", type=names(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--probe-s", type=float, help="seconds per offered rate")
    parser.add_argument("--rounds", type=int, help="turns of the servers at saturation")
    parser.add_argument("--out", type=Path, help="folder for results/ and plots/ (default: benchmarks/)")
    arguments = parser.parse_args()
    if arguments.servers == ["stock"]:
        parser.error("--servers needs one of ours: direct or ray")
    if arguments.probe_s is not None and arguments.probe_s <= 0:
        parser.error("--probe-s must be above 0")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if arguments.model is not None and arguments.published:
        parser.error("--published creates its own model: leave out --model")
    if arguments.model is None and not (arguments.quick or arguments.published):
        arguments.model = _DEMO
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model} is not a model folder")
    return arguments


def _plan(arguments: argparse.Namespace) -> LoadPlan:
    plan = QUICK if arguments.quick else FULL
    return replace(plan, probe_s=arguments.probe_s or plan.probe_s, rounds=arguments.rounds or plan.rounds)


def _start(stack: ExitStack, arguments: argparse.Namespace, model: Path, plan: LoadPlan) -> Bench:
    """Starts and warms up all systems under test."""
    alone = stack.enter_context(engine({"model": str(model)}))  # loads while the servers start
    servers: dict[str, Server] = {}
    for kind in arguments.servers:
        _say(f"starting {kind}")
        names = () if kind == "stock" else (GREEDY, MODEST)
        servers[kind] = stack.enter_context(serving(kind, {"model": str(model)}, key_names=names))
        warm_up(servers[kind])
    short_deadline = None
    if "overload" in arguments.only:
        _say("starting one with a short deadline")
        settings = {"model": str(model), "deadline_s": plan.short_deadline_s}
        short_deadline = stack.enter_context(serving("direct", settings))
        warm_up(short_deadline)
    return Bench(alone, servers, short_deadline, plan)


def _measure(bench: Bench, parts: list[str], document: dict[str, Any]) -> None:
    """Adds the results of the chosen parts to the document."""
    document["idle_cores"] = idle_cpu_shares(bench, seconds=3.0 if bench.plan.rounds > 1 else 1.0)
    _say("calibrating")
    calibration = document["calibration"] = calibrate(bench)
    ours = calibration["servers"][bench.ours.kind]
    if "saturation" in parts:
        _say("saturation")
        document["saturation"] = saturation(bench)
    if "concurrency_one" in parts:
        _say("one at a time")
        document["concurrency_one"] = concurrency_one(bench)
    if "goodput" in parts:
        _say("goodput")
        document["goodput"] = goodput(bench, calibration)
    if "sizes" in parts:
        _say("sizes")
        found = document.get("goodput", {}).get("found_rates", {}).get(bench.ours.kind)
        document["sizes"] = sizes(bench, 0.7 * (found or ours["requests_per_s"]))
    if "fairness" in parts:
        _say("fairness")
        document["fairness"] = fairness(bench)
    if "overload" in parts:
        _say("overload")
        document["overload"] = _overloads(bench, ours)


def _overloads(bench: Bench, ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Overload with the default deadline, where the queue length is the limit, and with a short one, where time is."""
    plan = bench.plan
    rate = plan.overload_factor * ours["requests_per_s"]
    rows = [overload(bench.ours, rate=rate, duration_s=plan.overload_s, deadline_s=_DEADLINE_S)]
    if bench.short_deadline is not None:
        deadline_s = plan.short_deadline_s
        rows.append(overload(bench.short_deadline, rate=rate, duration_s=plan.overload_s, deadline_s=deadline_s))
    return rows


def _store(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    tag = "-published" if arguments.published else ""
    plot_path = store_document(document, arguments.out, quick=arguments.quick, tag=tag)
    if "goodput" in document:
        plot(document, plot_path)
        _say(f"stored {plot_path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
