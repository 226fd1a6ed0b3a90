"""A preparation that is killed, interrupted or out of disk goes on where it was, to the same bytes."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data import journal
from engine.data import prepare as prepare_module
from engine.data.journal import Journal
from engine.data.prepare import prepare
from engine.data.sources import CropJob, PrepareOptions
from engine.errors import InputError
from engine.files import DiskFault, named_disk_faults
from tests.deliveries import delivery
from tests.paths import REPOSITORY

OPTIONS = PrepareOptions(image_size=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return delivery(tmp_path / "source", photos=5, held_out=2)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    prepare(source, tmp_path / "whole", OPTIONS)
    return files_of(tmp_path / "whole")


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the log, which has the time in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.log")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Counted:
    """Cuts photographs, and stops at one of them."""

    def __init__(self, stop_at: int | None, error: BaseException) -> None:
        self.stop_at, self.error, self.done = stop_at, error, 0
        self._cut = prepare_module._cut

    def __call__(self, job: CropJob, **arguments: Any) -> Any:
        if self.done == self.stop_at:
            raise self.error
        self.done += 1
        return self._cut(job, **arguments)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, source: Path, destination: Path, stop_at: int, error: BaseException
) -> None:
    monkeypatch.setattr(prepare_module, "_cut", Counted(stop_at, error))
    with pytest.raises(DiskFault if isinstance(error, OSError) else type(error)):
        prepare(source, destination, OPTIONS)
    monkeypatch.undo()


@pytest.mark.parametrize("stop_at", [0, 1, 13])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left", "x")])
def test_an_interrupted_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes], tmp_path: Path, stop_at: int, error: Any
) -> None:
    interrupted(monkeypatch, source, tmp_path / "out", stop_at, error)
    assert not (tmp_path / "out").exists()
    counted = Counted(None, error)
    monkeypatch.setattr(prepare_module, "_cut", counted)
    prepare(source, tmp_path / "out", OPTIONS)
    assert counted.done == 14 - stop_at
    assert files_of(tmp_path / "out") == whole
    log = (tmp_path / "out" / "prepare.log").read_text(encoding="utf-8")
    assert "cutting photographs 14/14, 0s left" in log


_KILLED = """
import os, sys
from pathlib import Path
from engine.data import journal, prepare
from engine.data.sources import PrepareOptions
journal.EVERY_ENTRIES = 3
cut, done = prepare._cut, 0
def killed(job, **arguments):
    global done
    done += 1
    if done == 9:
        os.kill(os.getpid(), 9)
    return cut(job, **arguments)
prepare._cut = killed
prepare.prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareOptions(image_size=8))
"""


def test_a_killed_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _KILLED, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    counted = Counted(None, KeyboardInterrupt())
    monkeypatch.setattr(prepare_module, "_cut", counted)
    prepare(source, tmp_path / "out", OPTIONS)
    assert counted.done == 14 - 6  # eight were cut, six of them noted
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-7],  # torn
        lambda content: content[:-20] + bytes(20),  # zeros, after a power failure
        lambda content: b"",
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_journal_is_used_as_far_as_it_is_whole(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    spoil: Callable[[bytes], bytes],
) -> None:
    for name in ("labels.jsonl", "cuts.jsonl", "identity.json"):
        interrupted(monkeypatch, source, tmp_path / name, 7, KeyboardInterrupt())
        file = tmp_path / f".preparing-{name}" / ".journal" / name
        file.write_bytes(spoil(file.read_bytes()))
        prepare(source, tmp_path / name, OPTIONS)
        assert files_of(tmp_path / name) == whole


@pytest.mark.parametrize("change", ["photo", "label", "option"])
def test_other_input_starts_anew(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, change: str, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, source, tmp_path / "out", 7, KeyboardInterrupt())
    if change == "photo":
        one, other = sorted(source.rglob("*.jpg"))[:2]
        one.write_bytes(other.read_bytes())
    elif change == "label":
        path = sorted(source.rglob("*.json"))[0]
        path.write_text(path.read_text(encoding="utf-8").replace("블랙", "화이트"), encoding="utf-8")
        os.utime(path, ns=(0, 0))
    options = PrepareOptions(image_size=16 if change == "option" else 8, max_bad=0.5)
    prepare(source, tmp_path / "out", options)
    assert "preparing starts anew" in capfd.readouterr().err
    prepare(source, tmp_path / "again", options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_max_bad_can_be_raised_after_an_interruption(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    interrupted(monkeypatch, source, tmp_path / "out", 7, KeyboardInterrupt())
    counted = Counted(None, KeyboardInterrupt())
    monkeypatch.setattr(prepare_module, "_cut", counted)
    prepare(source, tmp_path / "out", PrepareOptions(image_size=8, max_bad=0.5))
    assert counted.done == 7


def test_bad_input_leaves_nothing_of_an_unfinished_run(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    interrupted(monkeypatch, source, tmp_path / "out", 7, KeyboardInterrupt())
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="empty_file"):
        prepare(source, tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_empty_folder_stays_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """As a mount point must; by a link, too. The work lies inside it meanwhile."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    before = (tmp_path / "disk").stat().st_ino
    interrupted(monkeypatch, source, tmp_path / "out", 7, KeyboardInterrupt())
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [".preparing"]
    prepare(source, tmp_path / "out", OPTIONS)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk").stat().st_ino == before
    assert files_of(tmp_path / "disk") == whole
    with pytest.raises(InputError, match="exists already"):
        prepare(source, tmp_path / "out", OPTIONS)


def test_killed_while_the_parts_are_moved(
    monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    replace, moved = Path.replace, 0

    def some(path: Path, target: Path) -> Path:
        nonlocal moved
        if path.parent.name == ".preparing":
            moved += 1
            if moved == 3:
                raise SystemExit(143)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", some)
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    assert (tmp_path / "out" / "images").is_dir()
    prepare(source, tmp_path / "out", OPTIONS)
    assert files_of(tmp_path / "out") == whole


def test_two_runs_to_one_folder(source: Path, tmp_path: Path) -> None:
    code = "import sys, time\nfrom pathlib import Path\nfrom engine.folder_lock import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), field='x'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    lock = tmp_path / ".preparing-out" / ".journal" / "lock"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], env=environment, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(InputError, match=rf"process {other.pid} on .* works there"):
                prepare(source, tmp_path / "out", OPTIONS)
            assert lock.is_file()
        finally:
            other.kill()


def test_a_full_disk_is_one_line_and_keeps_the_work(
    monkeypatch: pytest.MonkeyPatch, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare_module, "_cut", Counted(7, OSError(errno.ENOSPC, "No space left on device", "x.png")))
    with pytest.raises(DiskFault, match="make room"), named_disk_faults(tmp_path):
        prepare(source, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    prepare(source, tmp_path / "out", OPTIONS)
    assert files_of(tmp_path / "out") == whole


def test_journal_entries_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(journal, "EVERY_ENTRIES", 3)
    file = tmp_path / "j.jsonl"
    entries = Journal(file)
    for number in range(7):
        entries.append({"n": number})
    assert len(file.read_text().splitlines()) == 6
    assert len(entries) == 7
    assert [entry["n"] for entry in entries] == list(range(7))
    assert len(Journal(file)) == 7
