"""A run that was stopped at any moment resumes to the same numbers, bit for bit."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config_files import load_run
from engine.models import folder as model_folder
from engine.training import checkpoints, trainer
from engine.training.checkpoints import complete_checkpoints
from engine.training.stage_dvae import DvaeStage
from engine.training.stage_kodalle import KodalleStage
from tests.engine.training.test_trainer import PRELOAD, STAGES, Losses, Same, Train, Tree, TreeOf
from tests.forked import run_forked


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """SIGTERM arrives while step number `step` is at work."""
    make = trainer.make_stage

    def with_signal(*arguments: Any) -> Any:
        made = make(*arguments)
        assert made.name == stage
        after_step = made.after_step

        def after(number: int) -> None:
            after_step(number)
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(made, "after_step", after)
        return made

    monkeypatch.setattr(trainer, "make_stage", with_signal)


@pytest.mark.exclusive  # bits are compared: no thread of another test's server may run beside
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_by_sigterm_and_resumed(
    stage: str,
    run_of: dict[str, Path],
    tree_of: TreeOf,
    train_tree: Train,
    losses: Losses,
    same_weights: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = tree_of(stage, tmp_path / "run")
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        stop_after(patched, stage, 3)
        with pytest.raises(SystemExit) as stopped:
            train_tree(tree)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped at step 3: run the same command to go on" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / "run" / "model").exists()
    torch.manual_seed(99)
    train_tree(tree)
    assert "resuming" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(run_of[stage])
    for name in ("model", "model-best"):
        same_weights(tmp_path / "run" / name, run_of[stage] / name)


def _killed(stage: str, file: Path) -> None:
    """Trains and dies of SIGKILL: VQGAN inside a checkpoint before its marker, KoCLIP inside the export of the best
    model, dVAE and KoDALLE between two checkpoints."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write_marker = checkpoints.write_json

    def write_but_at_step_6(path: Path, content: Tree) -> None:
        kill() if content["progress"]["step"] == 6 else write_marker(path, content)

    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "matrix_peak", lambda *_: 1e12)
    if stage == "vqgan":
        patch.setattr(checkpoints, "write_json", write_but_at_step_6)
    elif stage == "koclip":
        patch.setattr(model_folder, "write_json", kill)
    else:
        stages = {"dvae": DvaeStage, "kodalle": KodalleStage}
        patch.setattr(stages[stage], "after_step", lambda _, step: kill() if step == 5 else None)
    trainer.train(load_run(file))


@pytest.fixture(scope="module")
def killed(tree_of: TreeOf, write_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    files = {stage: write_tree(tree_of(stage, folder / stage), folder / f"{stage}.yaml") for stage in STAGES}
    for code, printed in run_forked(
        [(_killed, (stage, file)) for stage, file in files.items()], folder, preload=PRELOAD
    ):
        assert code == -signal.SIGKILL, printed
    return folder


@pytest.mark.exclusive  # bits are compared: no thread of another test's server may run beside
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "newest"), [("vqgan", 4), ("dvae", 4), ("koclip", 2), ("kodalle", 4)])
def test_killed_and_resumed(
    stage: str,
    newest: int,
    killed: Path,
    run_of: dict[str, Path],
    tree_of: TreeOf,
    train_tree: Train,
    losses: Losses,
    same_weights: Same,
) -> None:
    run = killed / stage
    assert complete_checkpoints(run / "checkpoints")[0].name == f"step-{newest:08d}"
    if stage == "vqgan":
        assert (run / "checkpoints" / ".partial-step-00000006").is_dir()
    train_tree(tree_of(stage, run))
    assert losses(run) == losses(run_of[stage])
    same_weights(run / "model", run_of[stage] / "model")
    assert not list(run.rglob(".partial-*"))


def test_finished_run_is_reported_and_left_alone(
    kodalle_run: Path, tree_of: TreeOf, train_tree: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten = ("config.yaml", ".lock", ".shards.lock")
    before = {path: path.stat().st_mtime_ns for path in kodalle_run.rglob("*") if path.name not in rewritten}
    assert train_tree(tree_of("kodalle", kodalle_run)) == kodalle_run / "model"
    message = capsys.readouterr().out
    assert "is finished (8 steps): nothing to do" in message
    assert "written after" not in message
    after = {path: path.stat().st_mtime_ns for path in kodalle_run.rglob("*") if path.name not in rewritten}
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in after if path.is_file())


@pytest.mark.parametrize("fault", ["truncated", "no marker"])
def test_incomplete_checkpoint_is_passed_over(
    fault: str,
    kodalle_run: Path,
    tree_of: TreeOf,
    train_tree: Train,
    losses: Losses,
    same_weights: Same,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(kodalle_run, run)
    shutil.rmtree(run / "model")
    newest = complete_checkpoints(run / "checkpoints")[0]
    if fault == "no marker":
        (newest / "complete.json").unlink()
    else:
        largest = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    train_tree(tree_of("kodalle", run))
    assert "at step 6" in capsys.readouterr().out
    assert losses(run) == losses(kodalle_run)
    same_weights(run / "model", kodalle_run / "model")


def test_killed_after_the_last_step_exports_without_training(
    kodalle_run: Path, tree_of: TreeOf, train_tree: Train, losses: Losses, same_weights: Same, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(kodalle_run, run)
    shutil.rmtree(run / "model")
    train_tree(tree_of("kodalle", run))
    assert losses(run) == losses(kodalle_run)
    same_weights(run / "model", kodalle_run / "model")
