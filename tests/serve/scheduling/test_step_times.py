import random

import pytest

from serve.scheduling.step_times import StepTimes


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepTimes(num_slots=32).seconds(32) is None


def test_the_average_follows_the_steps_of_its_own_load() -> None:
    times, draw = StepTimes(num_slots=32), random.Random(0)
    for _ in range(500):
        for rows in (4, 32):
            times.observe(seconds=0.001 * rows * draw.uniform(0.5, 1.5), rows=rows)
    assert times.seconds(4) == pytest.approx(0.004, rel=0.2)
    assert times.seconds(32) == pytest.approx(0.032, rel=0.2)


def test_unseen_loads_take_the_time_of_the_next_fuller_then_of_the_next_emptier() -> None:
    times = StepTimes(num_slots=32)
    times.observe(seconds=0.010, rows=8)
    assert times.seconds(32) == times.seconds(8) == times.seconds(1) == 0.010
    times.observe(seconds=0.030, rows=24)
    assert times.seconds(32) == times.seconds(12) == 0.030
    assert times.seconds(5) == 0.010


@pytest.mark.parametrize("num_slots", [1, 3, 8, 256])
def test_all_loads_have_a_place(num_slots: int) -> None:
    times = StepTimes(num_slots=num_slots)
    for rows in range(num_slots + 1):
        times.observe(seconds=1.0, rows=rows)
        assert times.seconds(rows) == 1.0
