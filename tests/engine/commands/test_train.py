"""Signals to `kodalle train` and `demo` reach the trainings that DeepSpeed's launcher started, and nothing else."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.commands import train

# Stand for the launcher, a training, and a training's loader of data. The training needs a moment for its checkpoint.
_LAUNCHER = """
import subprocess, sys
code = subprocess.run([sys.executable, "-c", sys.argv[2], *sys.argv[3:]]).returncode
sys.exit(code if code >= 0 else 241)
"""
_TRAINING = """
import signal, subprocess, sys, time
folder = sys.argv[1]
loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def stop(number, frame):
    time.sleep(0.3)
    open(folder + "/checkpoint", "w").write(str(loader.poll()))
    loader.kill()
    sys.exit(143)

if sys.argv[2] == "ready":
    signal.signal(signal.SIGTERM, stop)
open(folder + "/started", "w").close()
time.sleep(60)
"""


def _launch(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, mode: str = "ready") -> None:
    command = [sys.executable, "-c", _LAUNCHER, "deepspeed.launcher.launch", _TRAINING, str(folder), mode]
    monkeypatch.setattr(train, "launcher_command", lambda *_, **__: command)
    monkeypatch.setattr(train, "launcher_environment", lambda: dict(os.environ))

    def send() -> None:
        while not (folder / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        train.launch(["config.yaml"])
    finally:
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_reaches_the_training_and_its_checkpoint_is_waited_for(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.default_int_handler)  # in a shell's background SIGINT is ignored, as by nohup
    try:
        with pytest.raises(SystemExit) as left:
            _launch(tmp_path, monkeypatch, number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert left.value.code == 128 + number
    assert (tmp_path / "checkpoint").read_text() == "None"  # its loader was still there
    assert capfd.readouterr().err == ""  # the training says how far it came


def test_training_that_has_not_begun_has_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        _launch(tmp_path, monkeypatch, signal.SIGTERM, "importing")
    assert left.value.code == 143
    assert capfd.readouterr().err == "stopped before the next checkpoint: run the same command to go on\n"


def test_nohup_stays_nohup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP); os._exit(3)"]
    monkeypatch.setattr(train, "launcher_command", lambda *_, **__: command)
    monkeypatch.setattr(train, "launcher_environment", lambda: dict(os.environ))
    try:
        assert train.launch(["config.yaml"]) == 3
    finally:
        signal.signal(signal.SIGHUP, before)
