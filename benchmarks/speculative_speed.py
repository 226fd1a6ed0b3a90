"""What speculative decoding gains end to end, on trained models: whole generations with and without it, in turns.

    python benchmarks/speculative_speed.py [MODEL ...]

Sequences are decoded from the captions that the model folder shows as examples, several seeds each; tokens must be equal.
Times are processor time of one thread, so that other load on the machine falls out, and seconds by the clock beside them; the ratio
is what counts. Prints a table and, as the last line, one JSON document, also stored in <out>/results/speculative_speed/<hardware>.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, kept_when_stopped, print_document, store_document
from text_table import table

from engine.device import fit_to_machine
from engine.facts import facts
from engine.pipeline.pipeline import Pipeline

_CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [str(REPOSITORY / "models" / name) for name in ("clothing", "garments")]
    parser.add_argument("models", nargs="*", default=default, help="model folders")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 2], help="sequences decoded together")
    parser.add_argument("--repeat", type=int, default=6, help="captions and seeds")
    parser.add_argument("--out", type=Path, help="folder for results/ (default: benchmarks/)")
    arguments = parser.parse_args()
    fit_to_machine()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"benchmark": "speculative_speed", **facts(_CPU), "repeat": arguments.repeat, "rows": []}
    with kept_when_stopped(document):
        for model in arguments.models:
            pipelines = {name: Pipeline.from_pretrained(model, speculative=name == "speculative") for name in
                         ("single steps", "speculative")}  # fmt: skip
            for candidates in arguments.candidates:
                document["rows"].append(_row(Path(model).name, pipelines, candidates, arguments.repeat))
    store_document(document, arguments.out, quick=False)
    print(_table(document["rows"]), end="\n\n")
    print_document(document)
    return 1 if "stopped" in document else 0


def _row(model: str, pipelines: dict[str, Pipeline], candidates: int, repeat: int) -> dict[str, Any]:
    """Decodes the same requests both ways, in turns."""
    times_s: dict[str, list[float]] = {name: [] for name in pipelines}
    clock_s: dict[str, list[float]] = {name: [] for name in pipelines}
    captions = next(iter(pipelines.values())).caption_guide.examples
    for number in range(-1, repeat):  # the first packs weights and is not counted
        tokens = {}
        for name, pipeline in pipelines.items():
            params = pipeline.default_sampling_params.updated(candidates=candidates, seed=100 + number)
            requests = pipeline.prepare([captions[number % len(captions)]], params)
            started, started_clock = time.process_time(), time.perf_counter()
            tokens[name] = pipeline.decode(requests)[0]
            if number >= 0:
                times_s[name].append(time.process_time() - started)
                clock_s[name].append(time.perf_counter() - started_clock)
        if not torch.equal(*tokens.values()):
            raise AssertionError(f"{model}: tokens differ with candidates {candidates}, seed {100 + number}")
    single, speculative = (times_s[name] for name in ("single steps", "speculative"))
    ratios = [a / b for a, b in zip(single, speculative, strict=True)]
    by_clock = [a / b for a, b in zip(clock_s["single steps"], clock_s["speculative"], strict=True)]
    return {
        "model": model,
        "candidates": candidates,
        "single_steps_s": round(statistics.median(single), 4),
        "speculative_s": round(statistics.median(speculative), 4),
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "clock": {
            "single_steps_s": round(statistics.median(clock_s["single steps"]), 4),
            "speculative_s": round(statistics.median(clock_s["speculative"]), 4),
            "times_faster": round(statistics.median(by_clock), 2),
        },
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["model", "candidates", "single steps s", "speculative s", "times faster", "by the clock", "range"]
    return table(
        "whole generations, processor time of one thread",
        head,
        [
            [
                row["model"], str(row["candidates"]), f"{row['single_steps_s']:.2f}", f"{row['speculative_s']:.2f}",
                f"{row['times_faster']:.2f}", f"{row['clock']['times_faster']:.2f}", "{:.2f}-{:.2f}".format(*row["times_faster_range"]),
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
