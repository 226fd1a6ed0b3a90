"""Checkpoints, each complete or not there.

    checkpoints/step-00001200/
        <engine>/          DeepSpeed's own files, one folder per engine; pickles: trust them like code
        stage.safetensors  state of the stage besides the engines' (codebook usage), if it has any
        complete.json      step, best validation loss, number of processes, and the size of every file; written last

Each rank writes into a `.partial-` folder; when all are done, rank 0 writes `complete.json` and renames. Resume takes
the newest folder whose files all have the sizes that `complete.json` names, so a run killed inside a save goes on
from the one before. DeepSpeed's `latest` file is not used: it is truncated in place before all ranks have finished.
There is no generator state to keep: everything random is a function of (seed, step), see engine/data/order.py.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deepspeed.runtime.zero.utils import ZeRORuntimeException
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import InputError
from engine.files import write_json
from engine.training.process_group import World

MARKER = "complete.json"
# What DeepSpeed and torch raise over a file of another shape, stage or world, or one that is damaged.
_UNFIT = (RuntimeError, KeyError, ValueError, AssertionError, EOFError, pickle.UnpicklingError, ZeRORuntimeException)


class Restorable(Protocol):
    """What checkpoints need of a DeepSpeed engine."""

    def save_checkpoint(self, save_dir: str, /, *, tag: str, save_latest: bool) -> object: ...

    def load_checkpoint(self, load_dir: str, /, *, tag: str) -> tuple[str | None, Any]:
        """(path, client state); the path is None where nothing could be read."""


@dataclass(frozen=True)
class TrainingProgress:
    """Position of a run."""

    step: int = 0  # optimiser steps done
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None


def save(
    folder: Path,
    progress: TrainingProgress,
    engines: Mapping[str, Restorable],
    stage_state: dict[str, Tensor],
    *,
    world: World,
    keep: int,
) -> Path:
    """Writes a checkpoint from all ranks, then removes all but the newest `keep` complete ones."""
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-step-{progress.step:08d}"
    if world.is_main:
        for leftover in folder.glob(".partial-step-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _check_space(folder)
    world.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(partial / name), tag="state", save_latest=False)
    world.barrier()
    if world.is_main:
        if stage_state:
            save_file(stage_state, partial / "stage.safetensors")
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        write_json(partial / MARKER, {**progress.__dict__, "processes": world.size, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete_checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    world.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if _is_complete(path)]


def load(path: Path, engines: Mapping[str, Restorable], *, world: World) -> tuple[TrainingProgress, dict[str, Tensor]]:
    """Restores every engine; returns the position of the run and the stage's state.

    Raises:
        InputError: the checkpoint is of another model, of another number of processes (with which step s would see
            other images), or was written with other DeepSpeed settings.
    """
    marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    if marker["processes"] != world.size:
        raise InputError(
            "number of processes",
            world.size,
            f"{path} is of {marker['processes']}: start as many, or choose another run=…",
        )
    for name, engine in engines.items():
        if not (path / name).is_dir():
            raise InputError("checkpoint", path, f"has no `{name}`: it is of another stage; choose another run folder")
        try:
            loaded, _ = engine.load_checkpoint(str(path / name), tag="state")
        except _UNFIT as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                "checkpoint",
                path,
                f"does not fit this config ({reason}): undo the change, or choose another run folder",
            ) from error
        if loaded is None:
            raise InputError(
                "checkpoint", path, "DeepSpeed could not read it: remove this folder to use the one before"
            )
    stage_file = path / "stage.safetensors"
    state = load_file(stage_file) if stage_file.is_file() else {}
    return TrainingProgress(marker["step"], marker["best_loss"], marker["best_step"]), state


def _is_complete(path: Path) -> bool:
    marker = path / MARKER
    if not marker.is_file():
        return False
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items())


def _check_space(folder: Path) -> None:
    """Raises InputError on a disk too full for another checkpoint, before an older one is removed."""
    newest = complete_checkpoints(folder)[:1]
    if not newest:
        return
    size = sum(path.stat().st_size for path in newest[0].rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < 1.2 * size:
        raise InputError(
            "checkpoint folder",
            folder,
            f"needs {1.2 * size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free: make room",
        )
