"""The parts that `kodalle train PHOTOS` and `kodalle demo` share: images prepared once, three stages trained one on another."""

import os
from collections.abc import Sequence
from pathlib import Path

from engine.commands.train import StoppedTraining, launch
from engine.config_files import load_run
from engine.data.prepare import PrepareReport, prepare
from engine.data.sources import PrepareOptions
from engine.errors import InputError

STAGES = ("vqgan", "koclip", "kodalle")
TITLES = {
    "vqgan": "training VQGAN: images to tokens and back",
    "koclip": "training KoCLIP: scores of images and captions",
    "kodalle": "training KoDALLE: image tokens from captions",
}


def prepare_once(photos: Path, pairs: Path, options: PrepareOptions) -> PrepareReport | None:
    """Prepares `photos` into `pairs`, or goes on with it; None where that was done before."""
    if (pairs / "pairs.jsonl").is_file():  # the last that is written
        return None
    return prepare(photos, pairs, options, workers=os.cpu_count() or 1, progress=True)


def train_stage(
    stage: str, config: Path, out: Path, pairs: Path, overrides: Sequence[str] = (), *, num_processes: int = 1
) -> None:
    """One `deepspeed engine/train.py` run in `out/<stage>`, on the earlier stages there; none when it is finished."""
    places = {"run": out / stage, "data.pairs": pairs}
    if stage == "koclip":
        places["codec"] = out / "vqgan" / "model"
    if stage == "kodalle":
        places |= {"vqgan": out / "vqgan" / "model", "koclip": out / "koclip" / "model"}
        places["text.tokenizer"] = out / "koclip" / "model"
    stated = [f"{key}={value}" for key, value in places.items()]
    run_stage(stage, config, out / stage, [*stated, *overrides], num_processes=num_processes)


def run_stage(stage: str, config: Path, run: Path, overrides: Sequence[str] = (), *, num_processes: int = 1) -> None:
    """One `deepspeed engine/train.py` run in the folder `run`; none when it is finished."""
    if is_finished(run, config, overrides):
        print(f"{run} is finished: nothing to do", flush=True)
        return
    code = launch([str(config), *overrides], num_processes=num_processes)
    if code in (130, 143):
        raise StoppedTraining(code)  # a signal reached the training alone
    if code:
        raise InputError("training", stage, f"ended with exit code {code}: see above; run the same command to go on")


def is_finished(run: Path, config: Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a stage was exported, which is its last act, after as many steps as its config has now."""
    if not (run / "model").is_dir() or not (run / "config.yaml").is_file():
        return False
    before, now = load_run(run / "config.yaml").loop, load_run(config, list(overrides)).loop
    return (before.steps, before.epochs) == (now.steps, now.epochs)
