"""Checkpoints, each complete or not there.

    checkpoints/step-00001200/
        <engine>/          DeepSpeed's own files, one folder per engine; pickles: trust them like code
        stage.safetensors  state of the stage besides the engines' (codebook usage), if it has any
        complete.json      step, best validation loss, number of processes, digests of the run's inputs, and size and
                           SHA-256 of every file; with a digest of its own; written last

Each rank writes into a `.partial-` folder and reads back what it wrote; when all are done and everything is on the disk,
rank 0 writes `complete.json` and renames. A run resumes from the newest folder that holds exactly the files that its
`complete.json` names, with their bytes; what is passed over is named in one line. A checkpoint without digests is not
loaded. DeepSpeed's `latest` file is not used: it is truncated in place before all ranks have finished.
There is no generator state to keep: everything random is a function of (seed, step), see engine/data/order.py.
"""

import functools
import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import safetensors.torch
import torch
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor

from engine.errors import InputError
from engine.files import FileDigest, VerifiedFile, file_digest, sync, write_json
from engine.training.process_group import World

MARKER = "complete.json"
# What DeepSpeed and torch raise over a file of another shape, stage or version, and over one that cannot be read.
_UNFIT = (
    RuntimeError, KeyError, ValueError, AssertionError, AttributeError, TypeError, OSError, EOFError,
    pickle.UnpicklingError, ZeRORuntimeException,
)  # fmt: skip


class Restorable(Protocol):
    """What checkpoints need of a DeepSpeed engine."""

    checkpoint_engine: Any  # its `save(state, path)` writes each file; its `load` reads one

    def save_checkpoint(self, save_dir: str, /, *, tag: str, save_latest: bool) -> object: ...

    def load_checkpoint(self, load_dir: str, /, *, tag: str) -> tuple[str | None, Any]:
        """(path, client state); the path is None where nothing could be read."""


@dataclass(frozen=True)
class TrainingProgress:
    """Position of a run."""

    step: int = 0  # optimiser steps done
    best_loss: float | None = None  # lowest validation loss so far
    best_step: int | None = None


@dataclass(frozen=True)
class Marker:
    """What `complete.json` states."""

    progress: TrainingProgress
    processes: int
    inputs: dict[str, str]  # digests of what the run learns from; see engine/training/resumption.py
    files: dict[str, FileDigest]


def save(
    folder: Path,
    progress: TrainingProgress,
    engines: Mapping[str, Restorable],
    stage_state: dict[str, Tensor],
    *,
    world: World,
    keep: int,
    inputs: dict[str, str] | None = None,
) -> Path:
    """Writes a checkpoint from all ranks, then removes all but the newest `keep` complete ones.

    Raises:
        OSError: it could not be written; the older ones are as they were.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-step-{progress.step:08d}"
    if world.is_main:
        for leftover in folder.glob(".partial-step-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _check_space(folder)
    world.barrier()
    written: dict[str, FileDigest] = {}
    try:
        for name, engine in engines.items():
            engine.checkpoint_engine.save = functools.partial(_write_state, folder=partial, written=written)
            engine.save_checkpoint(str(partial / name), tag="state", save_latest=False)
        gathered = world.gather(written)
        if world.is_main:
            files = {name: digest for digests in gathered for name, digest in digests.items()}
            if stage_state:
                _write_verified(partial / "stage.safetensors", safetensors.torch.save(stage_state))
            _complete(partial, Marker(progress, world.size, inputs or {}, files))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(folder)
            _remove_all_but(folder, progress.step, keep)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its bytes are the ones that are missing
        raise
    world.barrier()
    return final


def resume(
    folder: Path, engines: Mapping[str, Restorable], *, world: World
) -> tuple[TrainingProgress, dict[str, Tensor]] | None:
    """Restores the newest checkpoint that is whole and fits; one line for each that is passed over.

    Returns:
        The position of the run and the stage's state; None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, and none can be used; or they are of another number of processes (with which
            step s would see other images).
    """
    first_fault: InputError | None = None
    for path in world.share(_step_folders(folder)):
        fault = world.share(fault_of(path) if world.is_main else None)
        if fault is None:
            marker = _read_marker(path)
            if marker.processes != world.size:
                raise InputError(
                    "number of processes",
                    world.size,
                    f"{path} is of {marker.processes}: start as many, or choose another run=…",
                )
            fault = _restore(path, engines)
            if world.any(fault is not None):
                fault = fault or "cannot be loaded by another process"
            else:
                state_file = path / "stage.safetensors"
                state = safetensors.torch.load_file(state_file) if state_file.is_file() else {}
                return marker.progress, state
        first_fault = first_fault or InputError(
            "checkpoint", path, f"{fault}; no other can be used: put a whole one back, or choose another run=… folder"
        )
        if world.is_main:
            print(f"note: checkpoint {path} is passed over: it {fault}", flush=True)
    if first_fault is not None:
        raise first_fault
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose files have the names and sizes that their marker states, newest first; contents are not read."""
    return [path for path in _step_folders(folder) if fault_of(path, read_files=False) is None]


def newest_marker(folder: Path) -> Marker | None:
    """The marker of the newest complete checkpoint; None if there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints, and none is complete. To start at step 0 would throw away what was learned.
    """
    found = _step_folders(folder)
    for path in found:
        if fault_of(path, read_files=False) is None:
            return _read_marker(path)
    if found:
        raise InputError(
            "checkpoint",
            found[0],
            f"{fault_of(found[0], read_files=False)}; no other can be used: put a whole one back, or choose another "
            "run=… folder",
        )
    return None


def fault_of(path: Path, *, read_files: bool = True) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence about it; None if it is whole.

    Args:
        read_files: compare the files' contents with their digests, not their sizes alone.
    """
    try:
        marker = _read_marker(path)
        found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MARKER}
        for name in sorted(found ^ marker.files.keys()):
            return f"has no {name}" if name in marker.files else f"has {name}, which {MARKER} does not name"
        for name, digest in marker.files.items():
            size = (path / name).stat().st_size
            if size != digest.size_bytes:
                return f"is damaged: {name} has {size} bytes, {digest.size_bytes} were written"
            if read_files and file_digest(path / name) != digest:
                return f"is damaged: {name} has other bytes than were written"
    except _BrokenMarkerError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


class _BrokenMarkerError(ValueError):
    """The text is the end of a sentence about the checkpoint."""


def _read_marker(path: Path) -> Marker:
    if not (path / MARKER).is_file():
        raise _BrokenMarkerError(f"has no {MARKER}")
    try:
        content = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "sha256" not in content:
            raise _BrokenMarkerError(f"has a {MARKER} without digests, by which alone it could be trusted")
        if content.pop("sha256") != _digest_of(content):
            raise _BrokenMarkerError(f"has a damaged {MARKER}")
        return Marker(
            TrainingProgress(**content["progress"]),
            int(content["processes"]),
            dict(content["inputs"]),
            {name: FileDigest(**digest) for name, digest in content["files"].items()},
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _BrokenMarkerError(f"has a damaged {MARKER}") from error


def write_marker(path: Path, marker: Marker) -> None:
    """Writes `complete.json` of the checkpoint in folder `path`."""
    content = asdict(marker)
    write_json(path / MARKER, {**content, "sha256": _digest_of(content)})


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _complete(partial: Path, marker: Marker) -> None:
    """Forces everything below `partial` to the disk and writes its marker."""
    files = dict(marker.files)
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        if (name := str(file.relative_to(partial))) not in files:  # not through `_write_state`: DeepSpeed's scripts
            sync(file)
            files[name] = file_digest(file)
    write_marker(partial, Marker(marker.progress, marker.processes, marker.inputs, files))
    for directory in sorted(path for path in partial.rglob("*") if path.is_dir()):
        sync(directory)
    sync(partial)


def _write_state(state_dict: object, path: str, *, folder: Path, written: dict[str, FileDigest]) -> None:
    """Takes the place of DeepSpeed's `CheckpointEngine.save`, which leaves its file in memory and reads nothing back."""
    with VerifiedFile(Path(path)) as file:
        torch.save(state_dict, cast(IO[bytes], file))  # it needs `write` and `flush` alone
    written[str(Path(path).relative_to(folder))] = file.digest


def _write_verified(path: Path, content: bytes) -> None:
    with VerifiedFile(path) as file:
        file.write(content)


def _restore(path: Path, engines: Mapping[str, Restorable]) -> str | None:
    """Loads every engine; returns what does not fit, as the end of a sentence about the checkpoint."""
    for name, engine in engines.items():
        if not (path / name).is_dir():
            return f"has no `{name}`: it is of another stage"
        try:
            loaded, _ = engine.load_checkpoint(str(path / name), tag="state")
        except _UNFIT as error:
            return f"does not fit this config ({' '.join(str(error).split())[:300]})"
        if loaded is None:
            return "cannot be read by DeepSpeed"
    return None


def _step_folders(folder: Path) -> list[Path]:
    """Newest first, complete or not."""
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if path.is_dir()]


def _remove_all_but(folder: Path, step: int, keep: int) -> None:
    """Removes old checkpoints, and those of later steps: the run resumed from before them because they are broken."""
    newest = folder / f"step-{step:08d}"
    for later in _step_folders(folder):
        if later.name > newest.name:
            shutil.rmtree(later)
    for old in complete_checkpoints(folder)[keep:]:
        shutil.rmtree(old)


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
