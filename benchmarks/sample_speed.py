"""Generation speed on this machine, its share of what the machine allows, and baselines beside it.

    python benchmarks/sample_speed.py                     the published sizes, random weights, everything
    python benchmarks/sample_speed.py --quick             a tiny model, in seconds
    python benchmarks/sample_speed.py --dtype float32,int8 --only ours --repeat 5

A step is limited by the read of the weights, so each row says what share of the floor was reached (the formulas are in
engine/measure.py, the machine's rates are measured in the same run). Each variant runs in a process of its own.
Prints tables and, as the last line, one JSON document, which is also stored with a plot:

    <out>/results/sample_speed/<hardware>.json      <out>/plots/sample_speed-<hardware>.png
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine_facts import child_environment, kept_when_stopped, print_document, store_document
from sampling.plan import (
    PARTS,
    VARIANTS,
    SamplingPlan,
    default_variants,
    published_sizes,
    tiny_sizes,
    write_random_model,
)
from sampling.plot import write_plot
from sampling.report import published_rows, ratios, tables
from sampling.rows import FIRST_SEED, GUIDANCE_SCALE
from text_table import NOT_MEASURED

from engine.device import fit_to_machine
from engine.facts import facts


def main() -> int:
    arguments = _arguments()
    fit_to_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = arguments.dtype or default_variants(device)
    document: dict[str, Any] = {
        "benchmark": "sample_speed",
        **facts(device),
        "config": _config(arguments),
        "gpu": "measured" if device.type == "cuda" else NOT_MEASURED,
        "rates": {},
        "equal_tokens": {},
        "rows": [],
        "failed": {},
    }
    with tempfile.TemporaryDirectory(prefix="sample-speed-") as folder:
        print(f"writing a {'tiny' if arguments.quick else 'full-size'} model of random weights", file=sys.stderr)
        write_random_model(Path(folder) / "model", tiny=arguments.quick)
        with kept_when_stopped(document):
            for name in variants:
                _measure(_plan(arguments, str(Path(folder) / "model"), device, name), document)
    document["ratios"] = ratios(document["rows"])
    document["published"] = published_rows()
    _store(document, arguments)
    print(tables(document), end="\n\n")
    print_document(document)
    return 1 if document["failed"] or "stopped" in document else 0


def _arguments() -> argparse.Namespace:
    def names(allowed: list[str]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            unknown = [name for name in chosen if name not in allowed]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(allowed)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description="Measures generation on this machine; see the file's head.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--out", type=Path, help="folder for results/ and plots/ (default: benchmarks/)")
    parser.add_argument(
        "--only", type=names(list(PARTS)), default=list(PARTS), help=f"of {','.join(PARTS)}; ours is always measured"
    )
    parser.add_argument("--dtype", type=names(list(VARIANTS)), help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--repeat", type=int, help="runs of each row at most (default: 3, on a GPU 30)")
    arguments = parser.parse_args()
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error("--repeat must be 1 or more")
    return arguments


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    transformer, vqgan, koclip = tiny_sizes() if arguments.quick else published_sizes()
    return {
        "quick": arguments.quick,
        "weights": "random",
        "transformer": transformer.model_dump(mode="json"),
        "vqgan": vqgan.model_dump(mode="json"),
        "koclip": koclip.model_dump(mode="json"),
        "prefix_positions": transformer.prefix_len,
        "image_tokens": transformer.image_seq_len,
        "sampling": {"temperature": 1, "top_k": None, "top_p": None, "first_seed": FIRST_SEED},
        "guidance_scale": GUIDANCE_SCALE,
    }


def _plan(arguments: argparse.Namespace, model: str, device: torch.device, variant: Any) -> SamplingPlan:
    """Sizes that end in minutes on two cores and in half of that on a GPU."""
    is_gpu, is_quick = device.type == "cuda", arguments.quick
    return SamplingPlan(
        model=model,
        device=device.type,
        variant=variant,
        parts=tuple(arguments.only),
        repeat=arguments.repeat or (30 if is_gpu else 3),
        row_budget_s=1 if is_quick else 6 if is_gpu else 25,
        candidates=4 if is_quick else 16,
        lengths_one=0 if is_gpu or is_quick else 9,
        lengths_many=0 if is_gpu or is_quick else 3,
        rate_seconds=0.05 if is_quick else 1.0,
        rate_bytes=1 << 24 if is_quick else None,
    )


def _measure(plan: SamplingPlan, document: dict[str, Any]) -> None:
    """Runs the worker and adds its results."""
    command = [sys.executable, "-m", "sampling.worker", plan.to_json()]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment(), check=False)
    if answer.returncode:
        document["failed"][plan.variant] = answer.returncode
        return
    result = json.loads(answer.stdout.splitlines()[-1])
    document["rates"][plan.variant] = result["rates"]
    document["rows"] += result["rows"]
    if "equal_tokens" in result:
        document["equal_tokens"][plan.variant] = result["equal_tokens"]


def _store(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    plot = store_document(document, arguments.out, quick=arguments.quick)
    if any(row["what"] == "ours" for row in document["rows"]):
        write_plot(document, plot)
        print(f"stored {plot}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
