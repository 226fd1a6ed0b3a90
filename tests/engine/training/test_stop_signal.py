"""Signals are requests to stop; repeated ones are the same request, later ones insist."""

import os
import signal

import pytest

from engine.training import stop_signal
from engine.training.stop_signal import StopSignal


class _InsistedError(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_repeated_signals_are_one_request_and_a_later_one_insists(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(stop_signal.time, "monotonic", lambda: now[0])

    def insist(_number: int, _frame: object) -> None:
        raise _InsistedError

    before = {each: signal.signal(each, insist) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        with StopSignal() as stop:
            assert stop.received == 0
            for each in (number, signal.SIGTERM, signal.SIGINT, number):  # as a terminal and two launchers send them
                os.kill(os.getpid(), each)
            assert stop.received == number
            now[0] += 10.0
            with pytest.raises(_InsistedError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is insist
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
