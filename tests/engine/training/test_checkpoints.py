"""Checkpoints are complete or not there. Engines are stand-ins here; test_trainer.py has the real ones."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import files
from engine.errors import InputError
from engine.training import checkpoints
from engine.training.checkpoints import MARKER, TrainingProgress, complete_checkpoints, newest_marker, resume, save
from engine.training.process_group import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class _Engine:
    """Saves and loads one number, as a DeepSpeed engine saves its state."""

    def __init__(self, number: int = 0, error: Exception | None = None) -> None:
        self.number, self.error = number, error
        self.checkpoint_engine = SimpleNamespace()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        if self.error is not None:
            raise self.error
        (Path(folder) / tag).mkdir(parents=True)
        state = {"number": self.number, "weights": torch.arange(300)}
        self.checkpoint_engine.save(state, str(Path(folder) / tag / "state.pt"))
        (Path(folder) / "script.py").write_text("written without the checkpoint engine\n")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, int]]:
        if self.error is not None:
            raise self.error
        self.number = torch.load(Path(folder) / tag / "state.pt")["number"]
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


def _resumed(folder: Path, engine: _Engine) -> tuple[TrainingProgress, dict[str, torch.Tensor]]:
    found = resume(folder, {"net": engine}, world=ALONE)
    assert found is not None
    return found


def test_save_and_resume(tmp_path: Path) -> None:
    _save(tmp_path, 7)
    engine = _Engine()
    progress, state = _resumed(tmp_path, engine)
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
    progress, state = _resumed(tmp_path, engine)
    assert (engine.number, progress, state) == (77, TrainingProgress(3), {})


def _flip(path: Path, position: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


STATE, SCRIPT, MORE = "net/state/state.pt", "net/script.py", "stage.safetensors"
# What happens to the newest checkpoint, and what is said about it. The last ones keep every size.
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no marker": (lambda at: (at / MARKER).unlink(), f"has no {MARKER}"),
    "half a marker": (lambda at: os.truncate(at / MARKER, 20), f"has a damaged {MARKER}"),
    "empty marker": (lambda at: os.truncate(at / MARKER, 0), f"has a damaged {MARKER}"),
    "other marker": (lambda at: (at / MARKER).write_text("[]"), f"has a {MARKER} without digests"),
    "marker of an earlier version": (
        lambda at: (at / MARKER).write_text('{"step": 2, "processes": 1, "files": {}}'),
        f"has a {MARKER} without digests",
    ),
    "another step in the marker": (
        lambda at: (at / MARKER).write_text((at / MARKER).read_text().replace('"step": 2', '"step": 3')),
        f"has a damaged {MARKER}",
    ),
    "truncated": (lambda at: os.truncate(at / STATE, 50), f"is damaged: {STATE} has 50 bytes"),
    "missing file": (lambda at: (at / MORE).unlink(), f"has no {MORE}"),
    "grown": (lambda at: (at / STATE).open("ab").write(b"x"), f"is damaged: {STATE} has"),
    "foreign file": (lambda at: (at / "net" / "x.pt").write_bytes(b""), f"has net/x.pt, which {MARKER} does not name"),
    "flipped bit": (lambda at: _flip(at / STATE), f"is damaged: {STATE} has other bytes"),
    "flipped bit in the stage's state": (lambda at: _flip(at / MORE), f"is damaged: {MORE} has other bytes"),
    "flipped bit in a script": (lambda at: _flip(at / SCRIPT), f"is damaged: {SCRIPT} has other bytes"),
    "zeros": (
        lambda at: (at / STATE).write_bytes(bytes((at / STATE).stat().st_size)),
        f"is damaged: {STATE} has other bytes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_checkpoint_is_passed_over_in_one_line(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path, 1, 2)
    break_it, message = FAULTS[fault]
    break_it(tmp_path / "step-00000002")
    engine = _Engine()
    progress, _ = _resumed(tmp_path, engine)
    assert (progress.step, engine.number) == (1, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: checkpoint {tmp_path / 'step-00000002'} is passed over: it {message}")
    # What the resumed run writes counts, the broken one of a later step does not.
    broken = tmp_path / "step-00000002"
    broken.rename(tmp_path / "step-00000005")
    _save(tmp_path, 3, keep=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003"]
    assert _resumed(tmp_path, engine)[0].step == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_with_every_checkpoint_broken_nothing_starts_at_step_0(tmp_path: Path, fault: str) -> None:
    _save(tmp_path, 1, 2)
    break_it, message = FAULTS[fault]
    for step in (1, 2):
        if fault != "another step in the marker" or step == 2:
            break_it(tmp_path / f"step-{step:08d}")
        else:
            (tmp_path / "step-00000001" / MARKER).unlink()
    with pytest.raises(InputError) as caught:
        resume(tmp_path, {"net": _Engine()}, world=ALONE)
    assert str(caught.value).startswith(f"checkpoint: {tmp_path / 'step-00000002'}: {message}")
    assert "no other can be used: put a whole one back" in str(caught.value)
    sizes_differ = list(FAULTS).index(fault) < list(FAULTS).index("flipped bit")
    if sizes_differ:  # seen before any data is read
        with pytest.raises(InputError, match="no other can be used"):
            newest_marker(tmp_path)


def test_marker_states_what_the_run_learns_from(tmp_path: Path) -> None:
    assert newest_marker(tmp_path) is None
    save(tmp_path, TrainingProgress(4), {"net": _Engine()}, {}, world=ALONE, keep=2, inputs={"captions": "abc"})
    marker = newest_marker(tmp_path)
    assert marker is not None
    assert marker.inputs == {"captions": "abc"}
    assert set(marker.files) == {STATE, SCRIPT}
    assert marker.files[STATE] == files.file_digest(tmp_path / "step-00000004" / STATE)


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folders, then the marker; after the rename the folder that holds the checkpoints."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)).lstrip("/"))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    _save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    partial = ".partial-step-00000001"
    for name in (STATE, SCRIPT, MORE, "net/state", "net"):
        assert f"{partial}/{name}" in before, name
    marker = next(number for number, name in enumerate(before) if name.startswith(f"{partial}/.partial-{MARKER}"))
    assert marker > max(before.index(f"{partial}/{name}") for name in (STATE, SCRIPT, MORE))
    assert before[-1] == partial
    assert after == [""]


def test_other_bytes_read_back_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    read = files.file_digest

    def spoiled(path: Path) -> files.FileDigest:
        _flip(path)
        return read(path)

    monkeypatch.setattr(files, "file_digest", spoiled)
    with pytest.raises(OSError, match=r"Other bytes are read back than were written: '.*state\.pt'"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


class _FullDisk:
    """A file that takes `room` bytes, and the rest, if there is any, when it is flushed."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, content: memoryview) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(content))

    def flush(self) -> None:
        if self._room < 10**6:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 150, 3000, 10**6 - 1, 10**9])
def test_disk_full_inside_a_file_names_it(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save has another error by the time it ends, without file or cause."""
    _save(tmp_path, 1)
    make = files.VerifiedFile.__init__

    def with_room(self: Any, path: Path) -> None:
        make(self, path)
        self._file = _FullDisk(self._file, room)

    monkeypatch.setattr(files.VerifiedFile, "__init__", with_room)
    if room == 10**9:
        _save(tmp_path, 2)
        assert _resumed(tmp_path, _Engine())[0].step == 2
        return
    with pytest.raises(OSError, match=r"No space left on device: '.*state\.pt'") as caught:
        _save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # its part of a checkpoint is room again


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
        resume(tmp_path, {"generator": _Engine()}, world=ALONE)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch\n for x"), KeyError("optimizer"), EOFError("")])
def test_checkpoint_that_does_not_fit(tmp_path: Path, error: Exception) -> None:
    _save(tmp_path, 1)
    with pytest.raises(InputError, match="does not fit this config") as caught:
        resume(tmp_path, {"net": _Engine(error=error)}, world=ALONE)
    assert "\n" not in str(caught.value)


def test_another_number_of_processes_is_rejected(tmp_path: Path) -> None:
    """Step s would be of other images: some would be seen twice, others never."""
    _save(tmp_path, 1)
    four = World(0, 4, 0, torch.device("cpu"))
    four.__dict__["share"] = lambda value: value  # without three others
    with pytest.raises(InputError, match=r"number of processes: 4: .* is of 1"):
        resume(tmp_path, {"net": _Engine()}, world=four)
