"""Minutes of training, summed over the logged steps; without encoding, validation, samples and checkpoints.

    python benchmarks/training_minutes.py runs/clothing --out benchmarks/results/clothing/training.json

Reads <folder>/{vqgan,koclip,kodalle}/log.jsonl. Run it on the machine of the trainings, which the document names.
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

_STAGES = ("vqgan", "koclip", "kodalle")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the runs of the three stages")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    arguments = parser.parse_args()
    document = {
        "benchmark": "training_minutes",
        **facts(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "stages": {stage: stage_minutes(arguments.folder / stage) for stage in _STAGES},
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
