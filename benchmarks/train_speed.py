"""Speed of KoDALLE training on this machine, and its share of the measured peak of matrix products.

    python benchmarks/train_speed.py                            the published 335 M, a few minutes
    python benchmarks/train_speed.py --quick                    a tiny model, in seconds: does it run?
    python benchmarks/train_speed.py --dtype bf16,fp16,fp32 --batch 256 --steps 1000     losses side by side

Each row is `engine/train.py` with configs/kodalle/kodalle.yaml in a process of its own, on images of noise, since the
time of a step does not depend on their content. Its log is read, and it is killed after its steps, before validation,
samples and export. The time of a step includes waiting for data, forward, backward, update and the check for finite
numbers. Prints a table and, as the last line, one JSON document, which is also stored:

    <out>/results/train_speed/<hardware>.json
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from machine_facts import (
    REPOSITORY,
    child_environment,
    hardware_name,
    kept_when_stopped,
    print_document,
    store_document,
)
from PIL import Image
from sampling.plan import CAPTION, published_sizes, tiny_sizes, write_random_model
from text_table import seconds_text, table

from engine.facts import facts
from engine.training.run_log import FLUSH_EVERY

Dtype = Literal["bf16", "fp16", "fp32"]
Row = dict[str, Any]

_FOLDER = Path(__file__).resolve().parent
_CONFIG = REPOSITORY / "configs" / "kodalle" / "kodalle.yaml"
_GROUP_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # of another training's processes
_LAST = 20  # steps whose mean loss is reported


@dataclass(frozen=True)
class TrainingPlan:
    """Trainings of one run of this benchmark; the defaults take eight minutes on two cores."""

    dtypes: tuple[Dtype, ...]
    batches: tuple[int, ...]  # images a step
    steps: int  # a multiple of FLUSH_EVERY: the log is written by so many
    warm_up_steps: int  # of them, not counted: first kernels, first allocations
    num_images: int  # of the data set
    limit_s: float  # of one row


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = _arguments(device)
    plan = _plan(arguments, device)
    transformer, vqgan, _ = tiny_sizes() if arguments.quick else published_sizes()
    document: dict[str, Any] = {
        "benchmark": "train_speed",
        **facts(device),
        "config": {
            "quick": arguments.quick,
            "plan": asdict(plan),
            "transformer": transformer.model_dump(mode="json"),
            "overrides": arguments.overrides,
        },
        "rows": [],
        "failed": {},
        "published": json.loads((_FOLDER / "published_training.json").read_text(encoding="utf-8")),
    }
    with tempfile.TemporaryDirectory(prefix="train-speed-") as name:
        folder = Path(name)
        print("writing a model of random weights and images of noise", file=sys.stderr)
        write_random_model(folder / "model", tiny=arguments.quick)
        _write_images(folder / "pairs", plan.num_images, vqgan.image_size)
        sizes = [f"model.{key}={json.dumps(value)}" for key, value in transformer.model_dump(mode="json").items()]
        with kept_when_stopped(document):
            for dtype, batch in itertools.product(plan.dtypes, plan.batches):
                settings = [*_settings(folder, dtype, batch, plan), *(sizes if arguments.quick else ())]
                _measure(folder, dtype, batch, plan, [*settings, *arguments.overrides], document)
    store_document(document, arguments.out, quick=arguments.quick)
    print(_table(document), end="\n\n")
    print_document(document)
    return 1 if document["failed"] or "stopped" in document else 0


def _arguments(device: torch.device) -> argparse.Namespace:
    def dtypes(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in get_args(Dtype):
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(get_args(Dtype))}")
            if name == "fp16" and device.type == "cpu":
                raise argparse.ArgumentTypeError("DeepSpeed has no fp16 on CPU: leave it out")
        return chosen

    def sizes(text: str) -> tuple[int, ...]:
        chosen = tuple(int(part) for part in text.split(","))
        if min(chosen) < 1:
            raise argparse.ArgumentTypeError("batches have 1 image or more")
        return chosen

    parser = argparse.ArgumentParser(description="Measures training on this machine; see the file's docstring.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--out", type=Path, help="folder for results/ (default: benchmarks/)")
    parser.add_argument("--dtype", type=dtypes, help=f"of {','.join(get_args(Dtype))}")
    parser.add_argument("--batch", type=sizes, help="images a step, e.g. 256,40")
    parser.add_argument("--steps", type=int, help=f"of each row, a multiple of {FLUSH_EVERY}")
    parser.add_argument("--limit-s", type=float, default=900.0, help="of each row")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for engine/train.py, e.g. attention=xformers"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.steps is not None and (arguments.steps < 2 * FLUSH_EVERY or arguments.steps % FLUSH_EVERY):
        parser.error(f"--steps must be a multiple of {FLUSH_EVERY}, {2 * FLUSH_EVERY} or more")
    return arguments


def _plan(arguments: argparse.Namespace, device: torch.device) -> TrainingPlan:
    is_gpu, is_quick = device.type == "cuda", arguments.quick
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16") if is_gpu else ("fp32",)
    batches = arguments.batch or ((4,) if is_quick else (256, 40) if is_gpu else (2,))
    return TrainingPlan(
        dtypes=arguments.dtype or dtypes,
        batches=batches,
        steps=arguments.steps or (40 if is_gpu else 20),
        warm_up_steps=10,
        num_images=max(2 * max(batches), 8),
        limit_s=arguments.limit_s,
    )


def _settings(folder: Path, dtype: Dtype, batch: int, plan: TrainingPlan) -> list[str]:
    """Overrides of the published run: data, models, and no output but the log."""
    never = plan.steps + 2 * FLUSH_EVERY  # the process is killed before
    return [
        f"run={folder / f'{dtype}-{batch}'}",
        f"data.pairs={folder / 'pairs'}",
        "data.validation_fraction=0",
        f"vqgan={folder / 'model'}",
        f"text.tokenizer={folder / 'model'}",
        f"token_shards={folder / 'shards'}",
        "koclip=null",
        "pretrained_text_embeddings=null",
        "embedding_std=0.02",
        "loop.epochs=null",
        f"loop.steps={never}",
        *(f"loop.{what}_every={never}" for what in ("validate", "sample", "checkpoint")),
        f"deepspeed.train_micro_batch_size_per_gpu={batch}",
        f"deepspeed.bf16.enabled={str(dtype == 'bf16').lower()}",
        f"deepspeed.fp16.enabled={str(dtype == 'fp16').lower()}",
    ]


def _write_images(folder: Path, number: int, image_size: int) -> None:
    """Captioned images of different noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png", compress_level=1)
        (folder / f"{index}.txt").write_text(CAPTION, encoding="utf-8")


def _measure(
    folder: Path, dtype: Dtype, batch: int, plan: TrainingPlan, settings: list[str], document: dict[str, Any]
) -> None:
    """One training; adds its row, or the reason why it failed."""
    name = f"{dtype}, {batch}"
    print(f"training: {name} images a step", file=sys.stderr)
    command = [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(_CONFIG), *settings]
    log, output = folder / f"{dtype}-{batch}" / "log.jsonl", folder / "output"
    environment = {key: value for key, value in child_environment().items() if key not in _GROUP_VARIABLES}
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            lines = _wait_for_steps(process, log, plan)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its data workers
            process.wait()
    if len(lines) < plan.steps:
        reason = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:] or ["(no output)"]
        document["failed"][name] = {"steps": len(lines), "exit_code": process.returncode, "output": reason}
        print(f"{name} ended after {len(lines)} steps:", *reason, sep="\n", file=sys.stderr)
        return
    document["rows"].append({"dtype": dtype, "batch": batch} | _figures(lines[: plan.steps], plan))


def _wait_for_steps(process: "subprocess.Popen[bytes]", log: Path, plan: TrainingPlan) -> list[Row]:
    """The log's lines once there are enough, or when the process has ended or takes too long."""
    ends_at = time.monotonic() + plan.limit_s
    while True:
        has_ended = process.poll() is not None or time.monotonic() > ends_at
        text = log.read_text(encoding="utf-8") if log.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if has_ended or len(lines) >= plan.steps:
            return lines
        time.sleep(0.2)


def _figures(lines: list[Row], plan: TrainingPlan) -> Row:
    """Medians over the steps after the warm-up."""
    counted = lines[plan.warm_up_steps :]
    rates = [float(line["images_per_s"]) for line in counted]
    return {
        "steps": len(counted),
        "images_per_s": statistics.median(rates),
        "images_per_s_range": [min(rates), max(rates)],
        "share_of_peak": statistics.median(float(line["share_of_peak"]) for line in counted),
        "peak_memory_gib": counted[-1].get("peak_memory_gib"),
        "loss_first": float(lines[0]["loss"]),
        "loss_last": statistics.fmean(float(line["loss"]) for line in lines[-_LAST:]),
        "loss_scale": float(lines[-1]["loss_scale"]),
        "skipped_steps": int(lines[-1]["skipped_steps"]),
        "losses": [round(float(line["loss"]), 5) for line in lines],
    }


def _table(document: dict[str, Any]) -> str:
    header = ("", "step", "images/s", "share of peak", "memory", f"loss, first and mean of the last {_LAST}")
    rows = [
        (
            f"{row['dtype']}, {row['batch']} a step",
            seconds_text(row["batch"] / row["images_per_s"]),
            f"{row['images_per_s']:#.3g}",
            f"{row['share_of_peak']:.0%}",
            "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f} GiB",
            f"{row['loss_first']:.3f}  {row['loss_last']:.3f}",
        )
        for row in document["rows"]
    ]
    rows += [(name, "failed", "-", "-", "-", failure["output"][-1]) for name, failure in document["failed"].items()]
    for row in document["published"]:
        rate = "-" if row["images_per_s"] is None else f"{row['images_per_s']:#.3g}"
        rows.append((row["system"], "-", rate, f"{row['share_of_peak']:.0%}", "-", f"{row['hardware']}, published"))
    return table(f"Training on {hardware_name(document)}", header, rows)


if __name__ == "__main__":
    sys.exit(main())
