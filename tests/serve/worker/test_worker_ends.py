"""How jobs end without images: cancelled, refused, too late, drained, or with a dead worker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from serve.messages import Finished, GenerationEvent, GenerationJob, Queued, Refused
from serve.worker.postprocessing import Postprocessor
from serve.worker.worker import Worker, WorkerFailed
from tests.serve.worker.test_worker import JOB, _events, _finished, _job, _run


async def _wait_until(holds: Callable[[], bool], *, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


def test_a_cancelled_job_frees_its_slots(worker: Worker) -> None:
    async def cancel() -> Finished:
        events: AsyncIterator[GenerationEvent] = worker.generate(_job(candidates=60, top=60, num_partials=7))
        await anext(events)
        assert worker.slots_in_use == worker.num_slots
        await events.aclose()  # type: ignore[attr-defined]
        assert worker.num_active == worker.queued_sequences == 0
        await _wait_until(lambda: worker.slots_in_use == 0)
        return await _finished(worker, JOB)

    assert _run(cancel()).images[0].data is not None


def test_a_reader_that_is_cancelled_while_it_waits_frees_its_slots(worker: Worker) -> None:
    async def cancel() -> None:
        reader = asyncio.create_task(_events(worker, _job(candidates=60)))
        await _wait_until(lambda: worker.slots_in_use > 0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await _wait_until(lambda: worker.slots_in_use == worker.num_active == 0)

    _run(cancel())


def test_a_full_queue_refuses_at_once(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(max_queued_sequences=8)

    async def run() -> GenerationEvent:
        first = asyncio.create_task(_events(worker, _job(candidates=14, request_id="first")))
        await _wait_until(lambda: worker.queued_sequences > 0)
        (refused,) = await _events(worker, _job(candidates=9, request_id="second"))
        assert not first.done(), "the refusal does not wait for the job ahead"
        assert isinstance((await first)[-1], Finished)
        return refused

    refused = _run(run())
    assert isinstance(refused, Refused)
    assert refused.reason == "queue_full"
    assert refused.retry_after_s is not None


def test_a_waiting_job_gets_its_queue_positions(worker: Worker) -> None:

    async def run() -> list[GenerationEvent]:
        others = [
            asyncio.create_task(_events(worker, _job(candidates=6, request_id=f"{number}"))) for number in range(3)
        ]
        await asyncio.sleep(0.01)
        events = await _events(worker, replace(JOB, request_id="last", wants_progress=True))
        await asyncio.gather(*others)
        return events

    events = _run(run())
    places = [event.position for event in events if isinstance(event, Queued)]
    assert places, "three other jobs are ahead"
    assert places == sorted(places, reverse=True)
    assert isinstance(events[-1], Finished)


def test_a_deadline_ends_a_job(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    (refused,) = _run(_events(worker, _job(candidates=60, deadline_s=0.03)))
    assert isinstance(refused, Refused)
    assert refused.reason == "deadline"
    assert worker.slots_in_use == 0


async def _num_admitted(worker: Worker, job: GenerationJob, count: int) -> int:
    """How many of `count` concurrent jobs are finished; the others are refused."""
    events = await asyncio.gather(*(_events(worker, replace(job, request_id=f"{number}")) for number in range(count)))
    return sum(isinstance(one[-1], Finished) for one in events)


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "control"])
def test_no_job_is_admitted_whose_postprocessing_would_be_too_late(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """At 10 s of decoding per image, of 14 jobs of two images no more are admitted than fit into 100 s."""
    worker = make_worker(num_slots=32)
    job = _job(candidates=2, top=1, wants_all=False, deadline_s=100.0)
    _run(_finished(worker, job))
    image_s = 10.0 if is_checked else 0.0
    monkeypatch.setattr(Postprocessor, "_image_s", property(lambda _: image_s, lambda *_: None), raising=False)
    admitted = _run(_num_admitted(worker, job, 14))
    if is_checked:
        assert 1 <= admitted <= 5, "5 times two images of 10 s"
    else:
        assert admitted == 14


def test_a_draining_worker_finishes_accepted_jobs(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()

    async def drain() -> tuple[list[GenerationEvent], list[GenerationEvent]]:
        running = asyncio.create_task(_events(worker, _job(candidates=12)))
        await asyncio.sleep(0.02)
        draining = asyncio.create_task(worker.drain())
        await asyncio.sleep(0)
        late = await _events(worker, replace(JOB, request_id="late"))
        await draining
        assert running.done()
        return await running, late

    accepted, late = _run(drain())
    assert isinstance(accepted[-1], Finished)
    assert isinstance(late[0], Refused)
    assert late[0].reason == "draining"


def test_a_dead_decode_loop_is_unhealthy_and_refuses_its_jobs(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    worker.check_health()
    worker._decode_loop._send_updates = None  # type: ignore[assignment, method-assign]  # calling it raises on the thread
    (refused,) = _run(_events(worker, JOB))
    assert isinstance(refused, Refused)
    assert refused.reason == "failed"
    with pytest.raises(WorkerFailed, match="died"):
        worker.check_health()


def test_a_decoding_failure_refuses_only_its_own_job(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = worker.pipeline.decode_images
    broken = [True]

    def fails_once(*arguments: Any, **named: Any) -> Any:
        if broken:
            broken.pop()
            raise RuntimeError("a bad image")
        return decode(*arguments, **named)

    monkeypatch.setattr(worker.pipeline, "decode_images", fails_once)
    (refused,) = _run(_events(worker, JOB))
    assert isinstance(refused, Refused)
    assert refused.reason == "failed"
    assert "bad image" not in refused.message
    assert _run(_finished(worker, JOB)).images[0].data is not None
    worker.check_health()


def test_a_closed_worker_refuses_its_jobs(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()

    async def close() -> list[GenerationEvent]:
        running = asyncio.create_task(_events(worker, _job(candidates=60)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(worker.close)
        return await running

    assert isinstance(_run(close())[-1], Refused)
