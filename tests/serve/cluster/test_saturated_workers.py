"""Cached refusals: only requests that would be refused again are refused by the API server itself."""

from dataclasses import replace

import pytest

from engine.sampling_params import SamplingParams
from serve.cluster.saturated_workers import TTL_S, SaturatedWorkers
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
    full.record(JOB, FULL)
    return full


def test_a_request_of_the_same_key_and_size_is_refused_for_a_moment(
    saturated_workers: SaturatedWorkers, now_s: list[float]
) -> None:
    assert saturated_workers.refusal(replace(_job(seed=8), request_id="other")) == FULL
    assert saturated_workers.refusal(_job(candidates=5)) == FULL
    guided = _job(candidates=2, guidance_scale=2.0)
    assert saturated_workers.refusal(guided) == FULL, "two slots a sequence"
    now_s[0] += TTL_S
    assert saturated_workers.refusal(JOB) is None


def test_a_smaller_request_or_another_key_is_sent_to_a_worker(saturated_workers: SaturatedWorkers) -> None:
    assert saturated_workers.refusal(_job(candidates=3)) is None
    assert saturated_workers.refusal(replace(JOB, key_id="modest")) is None


def test_only_a_refusal_by_every_tried_worker_is_cached() -> None:
    full = SaturatedWorkers(clock=lambda: 0.0)
    assert events_of(Workers([FULL], [None, DONE]), JOB, saturated_workers=full) == ([DONE], 0)
    assert full.refusal(JOB) is None
    workers = Workers([FULL])
    assert events_of(workers, JOB, saturated_workers=full) == ([FULL], 0)
    assert len(workers.jobs) == 2
    assert events_of(workers, JOB, saturated_workers=full) == ([FULL], 0)
    assert len(workers.jobs) == 2, "no worker is tried again"


def test_a_draining_workers_refusal_is_not_cached() -> None:
    full, draining = SaturatedWorkers(), Refused("draining", retry_after_s=1.0)
    assert events_of(Workers([draining]), JOB, saturated_workers=full) == ([draining], 0)
    assert full.refusal(JOB) is None
