"""One process at a time writes a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from engine.errors import InputError
from engine.folder_lock import hold_lock
from tests.paths import REPOSITORY

_HOLD = """
import sys
from pathlib import Path
from engine.folder_lock import hold_lock
with hold_lock(Path(sys.argv[1]), field="run", wait=sys.argv[2] == "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


def _start(path: Path, *, wait: bool = False) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path), "wait" if wait else ""],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip()


def test_second_process_is_told_who_holds_it_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with _start(path) as first:
        assert _line(first.stdout) == "held"
        with (
            pytest.raises(InputError, match=rf"^run: {path.parent}: process {first.pid} on \S+ works there: wait"),
            hold_lock(path, field="run"),
        ):
            pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert path.exists()
    with hold_lock(path, field="run"), _start(path) as second:
        assert f"process {os.getpid()} on" in second.communicate()[1]
        assert second.returncode == 1


def test_waiting_goes_on_when_the_holder_is_gone(tmp_path: Path) -> None:
    with _start(tmp_path / ".lock") as first:
        assert _line(first.stdout) == "held"
        with _start(tmp_path / ".lock", wait=True) as second:
            assert _line(second.stderr).startswith(f"waiting for process {first.pid} on ")
            first.communicate()
            assert _line(second.stdout) == "held"
            second.communicate()
            assert second.returncode == 0
