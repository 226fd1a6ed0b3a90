"""Numbered steps: what a signal in the middle of one says, and with which exit code."""

import signal

import pytest

from engine.commands.error_lines import _end
from engine.commands.steps import Steps
from engine.commands.train import StoppedTraining


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
