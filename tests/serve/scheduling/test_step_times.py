import random

import pytest

from serve.scheduling.step_times import StepTimes


def test_there_is_no_estimate_before_the_first_step() -> None:
    assert StepTimes(num_slots=32).seconds(32) is None


def test_each_occupancy_has_its_own_average() -> None:
    times, rng = StepTimes(num_slots=32), random.Random(0)
    for _ in range(500):
        for slots in (4, 32):
            times.observe(seconds=0.001 * slots * rng.uniform(0.5, 1.5), slots=slots)
    assert times.seconds(4) == pytest.approx(0.004, rel=0.2)
    assert times.seconds(32) == pytest.approx(0.032, rel=0.2)


def test_unmeasured_occupancies_use_the_next_fuller_then_the_next_emptier_one() -> None:
    times = StepTimes(num_slots=32)
    times.observe(seconds=0.010, slots=8)
    assert times.seconds(32) == times.seconds(8) == times.seconds(1) == 0.010
    times.observe(seconds=0.030, slots=24)
    assert times.seconds(32) == times.seconds(12) == 0.030
    assert times.seconds(5) == 0.010


@pytest.mark.parametrize("num_slots", [1, 3, 8, 256])
def test_every_occupancy_has_an_estimate(num_slots: int) -> None:
    times = StepTimes(num_slots=num_slots)
    for slots in range(num_slots + 1):
        times.observe(seconds=1.0, slots=slots)
        assert times.seconds(slots) == 1.0
