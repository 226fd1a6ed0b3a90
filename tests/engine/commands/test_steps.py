"""Numbered steps: the time left; what a signal in the middle of one says, and with which exit code."""

import re
import signal
import time

import pytest

from engine.commands.error_lines import _end
from engine.commands.steps import Steps
from engine.commands.train import StoppedTraining
from engine.progress import seconds_text


def _ctrl_c() -> None:
    raise KeyboardInterrupt


def _sigterm() -> None:
    _end(signal.SIGTERM, None)


def _training() -> None:
    raise StoppedTraining(143)


@pytest.mark.parametrize(
    ("work", "code", "said"), [(_ctrl_c, 130, True), (_sigterm, 143, True), (_training, 143, False)]
)
def test_a_signal_says_how_to_go_on_once(
    work: object, code: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps({"one": "counting", "two": "drawing"})
    steps.run("one", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        steps.run("two", work)  # type: ignore[arg-type]
    assert stopped.value.code == code
    printed, errors = capsys.readouterr()
    assert "[2/2] drawing" in printed
    assert errors == ("stopped while drawing: run the same command to go on\n" if said else "")
    assert list(steps.seconds) == ["one"]


def test_the_time_left_follows_the_pace_of_the_steps_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that an earlier run had done, and one without an expectation, say nothing about it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    names = ["check", "vqgan", "koclip", "kodalle"]
    steps = Steps({name: name for name in names}, {"vqgan": 100.0, "koclip": 50.0, "kodalle": 200.0})

    def takes(seconds: float) -> None:
        now[0] += seconds

    for name, seconds in zip(names, (30.0, 10.0, 25.0, 100.0), strict=True):
        steps.run(name, lambda seconds=seconds: takes(seconds))  # type: ignore[misc]
    left = re.findall(r"about (\w+) left", capsys.readouterr().out)
    assert left == [seconds_text(seconds) for seconds in (350, 350, 250, 100)]
