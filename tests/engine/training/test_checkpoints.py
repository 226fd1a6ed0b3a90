"""Checkpoints are complete or not there. Engines are stand-ins here; test_trainer.py has the real ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.errors import InputError
from engine.training import checkpoints
from engine.training.checkpoints import MARKER, TrainingProgress, complete_checkpoints, load, save
from engine.training.process_group import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class _Engine:
    """Saves and loads one number, as a DeepSpeed engine saves its state."""

    def __init__(self, number: int = 0, error: Exception | None = None) -> None:
        self.number, self.error = number, error

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        if self.error is not None:
            raise self.error
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "state.pt").write_bytes(b"x" * 100 + bytes([self.number]))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, int]]:
        if self.error is not None:
            raise self.error
        self.number = (Path(folder) / tag / "state.pt").read_bytes()[-1]
        return folder, {}


def _save(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(
            folder,
            TrainingProgress(step, 0.5, 1),
            {"net": _Engine(step)},
            {"x": torch.arange(3)},
            world=ALONE,
            keep=keep,
        )


def test_save_and_load(tmp_path: Path) -> None:
    _save(tmp_path, 7)
    engine = _Engine()
    progress, state = load(complete_checkpoints(tmp_path)[0], {"net": engine}, world=ALONE)
    assert progress == TrainingProgress(7, 0.5, 1)
    assert engine.number == 7
    assert torch.equal(state["x"], torch.arange(3))


def test_keeps_the_newest(tmp_path: Path) -> None:
    _save(tmp_path, 9, 10, 11, 100, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000100"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000100", "step-00000011"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    save(tmp_path, TrainingProgress(3), {"net": _Engine(77)}, {}, world=ALONE, keep=2)
    engine = _Engine()
    progress, state = load(complete_checkpoints(tmp_path)[0], {"net": engine}, world=ALONE)
    assert (engine.number, progress, state) == (77, TrainingProgress(3), {})


@pytest.mark.parametrize("fault", ["no marker", "broken marker", "other marker", "truncated", "missing file", "grown"])
def test_incomplete_is_passed_over(tmp_path: Path, fault: str) -> None:
    _save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    state = newest / "net" / "state" / "state.pt"
    if fault == "no marker":
        (newest / MARKER).unlink()
    elif fault == "broken marker":
        (newest / MARKER).write_bytes((newest / MARKER).read_bytes()[:20])
    elif fault == "other marker":
        (newest / MARKER).write_text("[]")
    elif fault == "truncated":
        state.write_bytes(state.read_bytes()[:50])
    elif fault == "missing file":
        (newest / "stage.safetensors").unlink()
    else:
        state.write_bytes(state.read_bytes() + b"x")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"]


def test_failed_save_leaves_the_older_ones(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(OSError, match="disk"):
        save(tmp_path, TrainingProgress(2), {"net": _Engine(error=OSError("disk"))}, {}, world=ALONE, keep=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"]
    _save(tmp_path, 3)  # cleans up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_no_folder_no_checkpoints(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "none") == []


def test_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(InputError, match=r"checkpoint folder: .* MiB are free: make room"):
        _save(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"]


def test_checkpoint_of_another_stage(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(InputError, match="has no `generator`: it is of another stage"):
        load(tmp_path / "step-00000001", {"generator": _Engine()}, world=ALONE)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch\n for x"), KeyError("optimizer"), EOFError("")])
def test_checkpoint_that_does_not_fit(tmp_path: Path, error: Exception) -> None:
    _save(tmp_path, 1)
    with pytest.raises(InputError, match="does not fit this config") as caught:
        load(tmp_path / "step-00000001", {"net": _Engine(error=error)}, world=ALONE)
    assert "\n" not in str(caught.value)


def test_another_number_of_processes_is_rejected(tmp_path: Path) -> None:
    """Step s would be of other images: some would be seen twice, others never."""
    _save(tmp_path, 1)
    assert json.loads((tmp_path / "step-00000001" / MARKER).read_text())["processes"] == 1
    with pytest.raises(InputError, match=r"number of processes: 4: .* is of 1"):
        load(tmp_path / "step-00000001", {"net": _Engine()}, world=World(0, 4, 0, torch.device("cpu")))
