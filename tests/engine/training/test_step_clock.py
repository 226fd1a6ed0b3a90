"""Steps that take ten times as long as is usual are reported, once."""

from collections.abc import Callable, Sequence

from engine.training.step_clock import SlowSteps


def _constant(value: float) -> Callable[[], float]:
    return lambda: value


def _reports(seconds: Sequence[float]) -> list[str]:
    steps = SlowSteps()
    lines = []
    for number, each in enumerate(seconds, 1):
        steps.add(number, _constant(each))
        lines += steps.reports()
    return lines


def test_a_step_of_ten_times_the_usual_is_reported() -> None:
    (line,) = _reports([0.5] * 9 + [60.0] + [0.5] * 9)
    assert line.startswith("note: step 10 took 60.0 s, 0.5 s are usual: other programs may have the processors")


def test_what_is_no_fault_is_not_reported() -> None:
    assert not _reports([60.0, 0.5, 0.5, 0.5, 0.5])  # the first steps compile and fill caches
    assert not _reports([0.5] * 9 + [4.9] + [0.5] * 9)
    assert not _reports([0.001] * 9 + [0.9])  # 900 times as long, and no one waits for it


def test_slow_for_good_is_reported_once_and_becomes_the_usual() -> None:
    assert len(_reports([0.5] * 60 + [60.0] * 500)) == 1
    assert len(_reports([0.5] * 60 + [60.0] + [0.5] * 60 + [60.0])) == 2


def test_durations_are_read_late() -> None:
    """Each reading waits for a GPU."""
    steps = SlowSteps()
    read = []

    def seconds() -> float:
        read.append(1)
        return 1.0

    for number in range(10):
        steps.add(number, seconds)
    assert not read
    assert not steps.reports()
    assert len(read) == 10
