"""What trainings that are disturbed are compared with, and the promises that are checked of each."""

import json
import random
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from engine.config.codec import VqganConfig
from engine.files import file_digest
from engine.models.folder import Part, write_model_folder
from engine.models.vqgan import Vqgan
from training.fault_process import Ended, WriteFault, train

Row = dict[str, Any]
STEPS = 8
SILENT = ("truncated", "flipped_bit", "zeroed")
_VQGAN = VqganConfig(
    image_size=16, base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    latent_channels=8, embed_dim=8, codebook_size=16,
)  # fmt: skip


@dataclass
class Bed:
    """A config, and what an undisturbed run of it leaves."""

    folder: Path
    rng: random.Random
    config: Path
    losses: list[Row] = field(default_factory=list)
    weights: str = ""
    write_points: dict[str, int] = field(default_factory=dict)  # of an undisturbed run, by kind of fault

    def write_fault(self, kind: str) -> WriteFault:
        """At a random write point of those that the next process will come to."""
        newest = newest_whole(self.run)
        steps_left = STEPS - (0 if newest is None else int(newest.name.removeprefix("step-")))
        points = self.write_points["flipped_bit" if kind in SILENT else "kill"] * steps_left // STEPS
        return WriteFault(kind, self.rng.randint(1, max(1, points)))

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def is_equal(self, run: Path) -> bool:
        """Whether losses and weights have the bits of the undisturbed run."""
        return read_losses(run) == self.losses and weights_digest(run) == self.weights


@dataclass
class Findings:
    """Of trainings that were disturbed; each broken promise is described."""

    broken: list[str] = field(default_factory=list)
    by_kind: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    passed_over: int = 0
    refused: int = 0
    equal_runs: int = 0

    def check(self, promise: str, kept: bool, ended: Ended) -> None:
        if not kept:
            self.broken.append(f"{promise}: exit code {ended.code}: {ended.printed[-600:]}")

    def row(self) -> Row:
        counts = {name: value for name, value in self.__dict__.items() if name not in ("broken", "by_kind")}
        kinds = dict(sorted(self.by_kind.items()))
        return {"faults": sum(kinds.values()), "by_kind": kinds, **counts, "broken_promises": self.broken}


def write_config(folder: Path) -> Path:
    """Squares with captions, a VQGAN with random weights, and the config of a tiny KoDALLE on them."""
    pairs = folder / "pairs"
    pairs.mkdir()
    colours = ("red", "green", "blue", "yellow", "white", "black")
    for number in range(12):
        ground, square = colours[number % 6], colours[(number + 1 + number // 6) % 6]
        image = Image.new("RGB", (16, 16), ground)
        image.paste(square, (4, 4, 12, 12))
        image.save(pairs / f"{number:02d}.png")
        (pairs / f"{number:02d}.txt").write_text(f"a {square} square on {ground}\n", encoding="utf-8")
    torch.manual_seed(0)
    weights = Vqgan(_VQGAN).state_dict()
    write_model_folder(folder / "vqgan", {"vqgan": Part(_VQGAN, weights)}, card="Random weights.\n")
    config = {
        "stage": "kodalle",
        "run": "given",
        "seed": 3,
        "data": {"pairs": str(pairs), "validation_fraction": 0.25},
        "text": {"tokenizer": "train", "vocab_size": 60},
        "vqgan": str(folder / "vqgan"),
        "model": {
            "dim": 16, "num_layers": 1, "num_heads": 1, "head_dim": 16, "attention_dropout": 0.1, "text_vocab_size": 64,
            "text_seq_len": 10, "text_position_rows": 16, "image_vocab_size": 16, "image_grid_size": 4,
        },
        "embedding_std": 0.02,
        "caption_dropout": 0.2,
        "loop": {
            "steps": STEPS, "validate_every": 4, "validation_batches": 1, "sample_every": STEPS, "sample_count": 1,
            "checkpoint_every": 1, "torch_threads": 1,
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def make_bed(folder: Path, seed: int) -> Bed:
    """The config of `write_config`, and the run of it that nothing disturbs."""
    file = write_config(folder)
    bed = Bed(folder, random.Random(seed), file)
    for run, kind in ((folder / "undisturbed", "kill"), (folder / "again", "flipped_bit")):
        ended = train(file, run, fault=WriteFault(kind, 0))  # strikes never, and counts
        if ended.code:
            sys.exit(f"the undisturbed training failed:\n{ended.printed}")
        bed.write_points[kind] = ended.write_points
        if not bed.losses:
            bed.losses, bed.weights = read_losses(run), weights_digest(run)
    if not bed.is_equal(folder / "again"):
        sys.exit("two undisturbed trainings differ: nothing can be compared")
    return bed


# ---------------------------------------------------------------------------------------------------------- what is checked


def check_resumption(found: Findings, ended: Ended, newest: Path | None) -> None:
    """It goes on from the newest whole checkpoint, or from the start where there is none."""
    said = re.search(r"resuming \S+ at step (\d+)", ended.printed)
    if said is not None:
        step = f"step-{int(said[1]):08d}"
        found.check("it resumes from the newest whole one", newest is not None and newest.name == step, ended)
        found.resumed += 1
    elif newest is not None:
        quiet = ended.struck or ended.code == -signal.SIGKILL or "is finished" in ended.printed
        found.check("it resumes", quiet, ended)


def check_finished(found: Findings, bed: Bed, ended: Ended) -> None:
    """An undisturbed end: equal to the run that nothing disturbed. The next process starts anew."""
    found.check("it ends well", ended.code == 0, ended)
    equal = ended.code == 0 and bed.is_equal(bed.run)
    found.check("losses and weights are equal bit for bit", equal, ended)
    found.equal_runs += equal
    shutil.rmtree(bed.run, ignore_errors=True)


def check_stopped(found: Findings, ended: Ended, run: Path, code: int = 128 + signal.SIGTERM) -> None:
    """A signal left a complete checkpoint of the last step, and the line that says so."""
    found.check("its exit code is the signal's", ended.code == code, ended)
    newest = newest_whole(run)
    found.check("a complete checkpoint is left", newest is not None, ended)
    step = 0 if newest is None else int(newest.name.removeprefix("step-"))
    found.check("it has the last step", step == last_logged_step(run), ended)
    found.check("it says so", f"stopped at step {step}: run the same command to go on" in ended.printed, ended)
    found.check("and nothing else", "Traceback" not in ended.printed, ended)


def is_one_line(ended: Ended, pattern: str) -> bool:
    """Whether it ended with one error that `pattern` matches, exit code 2 and no traceback."""
    lines = [line for line in ended.printed.splitlines() if line.startswith("error")]
    return (
        ended.code == 2
        and len(lines) == 1
        and re.fullmatch(rf"error: {pattern}", lines[0]) is not None
        and "Traceback" not in ended.printed
    )


def checkpoint_folders(run: Path) -> list[Path]:
    """Newest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def fault_of(path: Path) -> str | None:
    """`engine.training.checkpoints.fault_of`, which imports DeepSpeed."""
    from engine.training.checkpoints import fault_of

    return fault_of(path)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written."""
    return next((path for path in checkpoint_folders(run) if fault_of(path) is None), None)


def read_losses(run: Path) -> list[Row]:
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("images_per_s", "share_of_peak")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def last_logged_step(run: Path) -> int:
    """0 before the first line; the last line may be half-written."""
    path = run / "log.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', path.read_text(encoding="utf-8"), re.MULTILINE) if path.exists() else []
    return int(steps[-1]) if steps else 0


def weights_digest(run: Path) -> str:
    """Of the exported transformer."""
    return file_digest(run / "model" / "transformer.safetensors").sha256


def file_digests(run: Path) -> dict[str, str]:
    """Of all files but locks, by path."""
    names = sorted(path for path in run.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path): file_digest(path).sha256 for path in names}
