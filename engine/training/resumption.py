"""Whether a run may resume in its folder: only with the settings and the data that determine the computation unchanged."""

from pathlib import Path
from typing import Any

import yaml

from engine.config.run import Run
from engine.config.stages import KoclipRun, KodalleRun
from engine.config_files import load_run
from engine.data.digests import pairs_digests
from engine.data.tokenizer import load_tokenizer
from engine.errors import InputError
from engine.models.folder_config import weights_digest
from engine.training import checkpoints
from engine.training.batches import read_pairs
from engine.training.deepspeed_section import with_defaults

# Keys that may change between a run and its resumption: they determine when things are written, or where they lie, not
# what is computed. What lies at the paths is compared by its digest.
_FREE_ON_RESUME = {
    "loop": {"validate_every", "sample_every", "sample_count", "checkpoint_every", "keep_checkpoints", "log_every"}
    | {"max_skipped_steps", "torch_threads"},
    "data": {"num_workers", "cache_images", "pairs"},
    "text": {"tokenizer"},
}
_PLAIN = {"resume", "run", "vqgan", "koclip", "codec", "token_shards"}
_MAY_GROW = {"loop.steps", "loop.epochs"}


def check_folder(run: Run) -> None:
    """Raises InputError if the folder holds a run with other settings; called before shards or anything is written."""
    path = run.run / "config.yaml"
    newest = checkpoints.newest_marker(run.run / "checkpoints")
    if newest is None:
        return
    if run.resume == "never":
        raise InputError(
            "resume", "never", f"{run.run} holds a run of {newest.progress.step} steps: remove it, or resume: auto"
        )
    if path.is_file():
        try:
            started_with = load_run(path).model_dump(mode="json")  # fields added since then have their defaults
        except InputError:
            started_with = yaml.safe_load(
                path.read_text(encoding="utf-8")
            )  # a field that was removed: reported as a change
        _same_computation(started_with, run.model_dump(mode="json"), run.run)


def check_inputs(run: Run) -> dict[str, str]:
    """Digests of what the run learns from, compared with those of its newest checkpoint.

    The held-out pairs belong to them: the best model is chosen by its loss on them, over the whole run.

    Raises:
        InputError: captions, images, the tokenizer or the VQGAN are not those that the run was started with; or one of
            them cannot be read.
    """
    pairs = read_pairs(run.data, run.seed)
    inputs = pairs_digests(pairs, balance=run.data.balance)
    sources: dict[str, object] = dict.fromkeys(inputs, run.data.pairs)
    if isinstance(run, KoclipRun | KodalleRun):
        # A tokenizer that is trained follows from the training captions.
        name = run.text.tokenizer
        inputs["text.tokenizer"] = name if run.text.is_trained else load_tokenizer(name).digest
        sources["text.tokenizer"] = run.text.tokenizer
    vqgan = run.vqgan if isinstance(run, KodalleRun) else run.codec if isinstance(run, KoclipRun) else None
    if vqgan is not None:
        name = "vqgan" if isinstance(run, KodalleRun) else "codec"
        inputs[name] = weights_digest(vqgan, "vqgan")
        sources[name] = vqgan
    newest = checkpoints.newest_marker(run.run / "checkpoints")
    before = newest.inputs if newest is not None else inputs
    for name in sorted(inputs.keys() | before.keys()):
        if inputs.get(name) != before.get(name):
            raise InputError(
                name, sources.get(name), f"differs from what {run.run} was started with: restore it, or choose another "
                "run=… folder"
            )  # fmt: skip
    return inputs


def _same_computation(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for key in sorted(old.keys() | new.keys()):
        if key in _PLAIN:
            continue
        before, after = old.get(key), new.get(key)
        if key == "deepspeed" and isinstance(before, dict):
            before, after = (
                with_defaults(before),
                with_defaults(dict(after or {})),
            )  # to write a default out changes nothing
        free = _FREE_ON_RESUME.get(key, set())
        if isinstance(before, dict) and isinstance(after, dict):
            for inner in sorted(before.keys() | after.keys()):
                if inner not in free and before.get(inner) != after.get(inner):
                    _compare(f"{key}.{inner}", before.get(inner), after.get(inner), folder)
        elif before != after:
            _compare(key, before, after, folder)


def _compare(field: str, before: Any, after: Any, folder: Path) -> None:
    """Raises InputError for a changed value, unless the run is only made longer."""
    if field in _MAY_GROW and before is not None and after is not None and after > before:
        return
    remedy = "undo the change, or choose another run=… folder"
    raise InputError(field, repr(after), f"{folder} was started with {before!r}: {remedy}")
