"""Minutes of training, summed over the logged steps; without encoding, validation, samples and checkpoints.

    python benchmarks/training_minutes.py runs/clothing/vqgan128 runs/clothing/kodalle runs/clothing/decoder128 \
        --out benchmarks/results/clothing/training-128.json

Reads log.jsonl and config.yaml of each run. Run it on the machine of the trainings, which the document names.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine_facts import print_document

from engine.config_files import load_run
from engine.facts import facts
from engine.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments = parser.parse_args()
    document = {
        "benchmark": "training_minutes",
        **facts(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "stages": {run.name: stage_minutes(run) for run in arguments.runs},
    }
    write_json(arguments.out, document)
    print_document(document)
    return 0


def stage_minutes(run: Path) -> dict[str, Any]:
    """Steps, images a step, and minutes of all steps of a run whose every step is logged."""
    images = load_run(run / "config.yaml").deepspeed["train_micro_batch_size_per_gpu"]
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [one["images_per_s"] for one in map(json.loads, lines) if "images_per_s" in one]
    return {"steps": len(rates), "images": images, "minutes": round(sum(images / rate for rate in rates) / 60, 1)}


if __name__ == "__main__":
    sys.exit(main())
