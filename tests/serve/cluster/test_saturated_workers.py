"""A crowd is refused by what the first of it was told, and nobody else is."""

from dataclasses import replace

import pytest

from engine.sampling_params import SamplingParams
from serve.cluster.saturated_workers import KEPT_S, SaturatedWorkers
from serve.messages import GenerationJob, Refused
from tests.serve.cluster.test_rerun import DONE, Workers, events_of

JOB = GenerationJob("r", "greedy", "빨강", SamplingParams(seed=7, candidates=4, top=1), deadline_s=30.0)


def _job(**changes: float) -> GenerationJob:
    return replace(JOB, sampling_params=JOB.sampling_params.updated(**changes))


FULL = Refused("queue_full", retry_after_s=3.0)


@pytest.fixture
def now_s() -> list[float]:
    return [100.0]


@pytest.fixture
def saturated_workers(now_s: list[float]) -> SaturatedWorkers:
    full = SaturatedWorkers(clock=lambda: now_s[0])
    full.note(JOB, FULL)
    return full


def test_as_much_for_the_same_key_is_refused_for_a_moment(
    saturated_workers: SaturatedWorkers, now_s: list[float]
) -> None:
    assert saturated_workers.refusal(replace(_job(seed=8), request_id="other")) == FULL
    assert saturated_workers.refusal(_job(candidates=5)) == FULL
    guided = _job(candidates=2, guidance_scale=2.0)
    assert saturated_workers.refusal(guided) == FULL, "two slots a row"
    now_s[0] += KEPT_S
    assert saturated_workers.refusal(JOB) is None


def test_less_or_another_key_is_asked_about(saturated_workers: SaturatedWorkers) -> None:
    assert saturated_workers.refusal(_job(candidates=3)) is None
    assert saturated_workers.refusal(replace(JOB, key_id="modest")) is None


def test_only_what_every_asked_worker_refused_is_remembered() -> None:
    full = SaturatedWorkers()
    assert events_of(Workers([FULL], [None, DONE]), JOB, saturated_workers=full) == ([DONE], 0)
    assert full.refusal(JOB) is None
    workers = Workers([FULL])
    assert events_of(workers, JOB, saturated_workers=full) == ([FULL], 0)
    assert len(workers.jobs) == 2
    assert events_of(workers, JOB, saturated_workers=full) == ([FULL], 0)
    assert len(workers.jobs) == 2, "not asked again"


def test_a_worker_that_stops_says_nothing_of_the_others() -> None:
    full, draining = SaturatedWorkers(), Refused("draining", retry_after_s=1.0)
    assert events_of(Workers([draining]), JOB, saturated_workers=full) == ([draining], 0)
    assert full.refusal(JOB) is None
