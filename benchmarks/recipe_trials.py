"""Which changes of the transformer's recipe let it learn more from the same pictures, each alone against the plain recipe.

    python benchmarks/recipe_trials.py configs/clothing/kodalle.yaml --steps 120 --seeds 1 2

Every variant trains the config's model from the start with the same data, schedule, batch and number of steps, and once more with
each further seed. `plain` is AdamW without options. What counts is the held-out loss of image tokens, and after which share of
the steps a variant is at the loss that `plain` ends with (`steps_to_plain`, between two validations by interpolation; null: never).

Runs lie in `--runs`, are resumed, and those that have ended are read again; images are encoded once and their token shards copied.
Stores benchmarks/results/recipe_trials/<config's folder>-<steps>.json after each run, prints a table and the document.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine_facts import REPOSITORY, print_document, stored_path
from text_table import table
from training.short_run import short_run

from engine.facts import facts
from engine.files import write_json

MUON = "{type: Muon, params: {lr: 0.02, adam_lr: 1.0e-3, momentum: 0.95, weight_decay: 0.05, betas: [0.9, 0.98]}}"
ADAMW = "{type: AdamW, params: {lr: 1.0e-3, betas: [0.9, 0.98], weight_decay: %s, torch_adam: true}}"
PLAIN = {
    "deepspeed.optimizer": ADAMW % 0.05, "weight_decay_on": "all", "order_annealing": "null",
    "model.qk_norm": "false", "model.zero_init_branches": "false", "model.x0_scalars": "false", "model.target_positions": "false",
}  # fmt: skip
VARIANTS: dict[str, dict[str, str]] = {
    "plain": {},
    "order_annealing": {"model.target_positions": "true", "order_annealing": "{start: 0.5, end: 0.75}"},
    "muon": {"deepspeed.optimizer": MUON, "weight_decay_on": "matrices"},
    "qk_norm+zero_init": {"model.qk_norm": "true", "model.zero_init_branches": "true"},
    "x0_scalars": {"model.x0_scalars": "true"},
    "weight_decay_0.3": {"deepspeed.optimizer": ADAMW % 0.3, "weight_decay_on": "matrices"},
    "together": {
        "deepspeed.optimizer": MUON, "weight_decay_on": "matrices",
        "model.qk_norm": "true", "model.zero_init_branches": "true", "model.x0_scalars": "true",
    },
}  # fmt: skip

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--validate-every", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "recipe_trials")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "recipe_trials")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every run, e.g. vqgan=models/clothing"
    )
    arguments = parser.parse_args()
    document: Row = {"benchmark": "recipe_trials", **facts(torch.device("cpu")), "config": {}, "runs": []}
    document["config"] = {
        name: stored_path(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "out"
    }
    store = arguments.out / f"{arguments.config.parent.name}-{arguments.steps}.json"
    for seed in arguments.seeds:
        for variant in arguments.variants:
            document["runs"].append({"variant": variant, "seed": seed, "held_out": train(arguments, variant, seed)})
            document["variants"] = summary(document["runs"])
            write_json(store, document)
    print(_table(document))
    print_document(document)
    return 0


def train(arguments: argparse.Namespace, variant: str, seed: int) -> list[tuple[int, float]]:
    """(step, held-out loss of image tokens) of a run; trains it if it has not ended."""
    run: Path = arguments.runs / f"{variant}-{seed}"
    found = held_out(run)
    if not found or found[-1][0] < arguments.steps:
        shards = next((other / "shards" for other in sorted(arguments.runs.glob("*-*")) if held_out(other)), None)
        if shards is not None and not (run / "shards").exists():
            shutil.copytree(shards, run / "shards")
        steps = arguments.steps
        settings = PLAIN | VARIANTS[variant]
        settings |= short_run(steps, batch=arguments.batch, checkpoint_every=steps, warmup=steps // 12)
        settings |= {
            "run": str(run), "seed": str(seed), "koclip": "null", "loop.validate_every": str(arguments.validate_every),
        }  # fmt: skip
        command = [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(arguments.config)]
        command += [f"{name}={value}" for name, value in settings.items()] + arguments.set
        subprocess.run(command, cwd=REPOSITORY, env={"DS_ACCELERATOR": "cpu"} | dict(os.environ), check=True)
        found = held_out(run)
    return found


def held_out(run: Path) -> list[tuple[int, float]]:
    """(step, held-out loss of image tokens) that a run has logged."""
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return [(row["step"], row["validation_loss_image"]) for row in rows if "validation_loss_image" in row]


def summary(runs: list[Row]) -> dict[str, Row]:
    """Of each variant, over its seeds: the last held-out loss, its spread, and the steps to plain's last loss of the same seed."""
    plain = {run["seed"]: run["held_out"] for run in runs if run["variant"] == "plain"}
    found: dict[str, Row] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        last = [run["held_out"][-1][1] for run in own]
        reached = [steps_to(run["held_out"], plain[run["seed"]][-1][1]) for run in own if run["seed"] in plain]
        share = [
            steps / plain[run["seed"]][-1][0] for steps, run in zip(reached, own, strict=False) if steps is not None
        ]
        found[variant] = {
            "seeds": len(own),
            "held_out_loss": statistics.mean(last),
            "least": min(last),
            "most": max(last),
            "steps_to_plain": statistics.mean(share) if share and len(share) == len(own) else None,
        }
    return found


def steps_to(curve: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first is at a loss, by linear interpolation; None if it never is."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def _table(document: Row) -> str:
    rows = [
        [name, f"{row['held_out_loss']:.3f}", f"{row['least']:.3f} to {row['most']:.3f}",
         "never" if row["steps_to_plain"] is None else f"{row['steps_to_plain']:.0%}"]
        for name, row in document["variants"].items()
    ]  # fmt: skip
    return table(
        f"{document['config']['steps']} steps", ["variant", "held-out loss", "of seeds", "steps to plain's"], rows
    )


if __name__ == "__main__":
    sys.exit(main())
