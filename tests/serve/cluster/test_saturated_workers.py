"""A crowd is refused by what the first of it was told, and nobody else is."""

from dataclasses import replace

import pytest

from engine.sampling_params import SamplingOptions
from serve.cluster.saturated_workers import KEPT_S, LatelyFull
from serve.messages import DrawJob, Refused
from tests.serve.cluster.test_rerun import DONE, Drawers, events_of

JOB = DrawJob("r", "greedy", "빨강", seed=7, num_candidates=4, num_images=1, deadline_s=30.0)
FULL = Refused("queue_full", retry_after_s=3.0)


@pytest.fixture
def now_s() -> list[float]:
    return [100.0]


@pytest.fixture
def lately_full(now_s: list[float]) -> LatelyFull:
    full = LatelyFull(clock=lambda: now_s[0])
    full.note(JOB, FULL)
    return full


def test_as_much_for_the_same_key_is_refused_for_a_moment(lately_full: LatelyFull, now_s: list[float]) -> None:
    assert lately_full.refusal(replace(JOB, request_id="other", seed=8)) == FULL
    assert lately_full.refusal(replace(JOB, num_candidates=5)) == FULL
    guided = replace(JOB, num_candidates=2, options=SamplingOptions(guidance_scale=2.0))
    assert lately_full.refusal(guided) == FULL, "two slots a row"
    now_s[0] += KEPT_S
    assert lately_full.refusal(JOB) is None


def test_less_or_another_key_is_asked_about(lately_full: LatelyFull) -> None:
    assert lately_full.refusal(replace(JOB, num_candidates=3)) is None
    assert lately_full.refusal(replace(JOB, key_id="modest")) is None


def test_only_what_every_asked_drawer_refused_is_remembered() -> None:
    full = LatelyFull()
    assert events_of(Drawers([FULL], [None, DONE]), JOB, lately_full=full) == ([DONE], 0)
    assert full.refusal(JOB) is None
    drawers = Drawers([FULL])
    assert events_of(drawers, JOB, lately_full=full) == ([FULL], 0)
    assert len(drawers.jobs) == 2
    assert events_of(drawers, JOB, lately_full=full) == ([FULL], 0)
    assert len(drawers.jobs) == 2, "not asked again"


def test_a_drawer_that_stops_says_nothing_of_the_others() -> None:
    full, draining = LatelyFull(), Refused("draining", retry_after_s=1.0)
    assert events_of(Drawers([draining]), JOB, lately_full=full) == ([draining], 0)
    assert full.refusal(JOB) is None
