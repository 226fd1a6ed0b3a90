"""Whether a run may resume in its folder: only with the settings that determine the computation unchanged."""

from pathlib import Path
from typing import Any

import yaml

from engine.config import Run
from engine.config_files import load_run
from engine.errors import InputError
from engine.training import checkpoints

# Keys that may change between a run and its resumption: they determine when things are written, not what is computed.
_FREE_ON_RESUME = {
    "loop": {"validate_every", "sample_every", "sample_count", "checkpoint_every", "keep_checkpoints", "log_every"}
    | {"max_skipped_steps", "torch_threads"},
    "data": {"num_workers", "cache_images"},
}
_PLAIN = {"resume", "run"}


def check_folder(run: Run) -> None:
    """Raises InputError if the folder holds a run with other settings; called before shards or anything is written."""
    path = run.run / "config.yaml"
    found = checkpoints.complete_checkpoints(run.run / "checkpoints")
    if found and run.resume == "never":
        raise InputError(
            "resume", "never", f"{run.run} holds a run (newest checkpoint {found[0].name}): remove it, or resume: auto"
        )
    if found and path.is_file():
        try:
            started_with = load_run(path).model_dump(mode="json")  # fields added since then have their defaults
        except InputError:
            started_with = yaml.safe_load(
                path.read_text(encoding="utf-8")
            )  # a field that was removed: reported as a change
        _same_computation(started_with, run.model_dump(mode="json"), run.run)


def _same_computation(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for key in sorted(old.keys() | new.keys()):
        if key in _PLAIN:
            continue
        before, after = old.get(key), new.get(key)
        free = _FREE_ON_RESUME.get(key, set())
        if isinstance(before, dict) and isinstance(after, dict):
            for inner in sorted(before.keys() | after.keys()):
                if inner not in free and before.get(inner) != after.get(inner):
                    _refuse_change(f"{key}.{inner}", before.get(inner), after.get(inner), folder)
        elif before != after:
            _refuse_change(key, before, after, folder)


def _refuse_change(field: str, before: object, after: object, folder: Path) -> None:
    raise InputError(
        field, repr(after), f"{folder} was started with {before!r}: undo the change, or choose another run=… folder"
    )
