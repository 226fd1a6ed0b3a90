"""A job whose worker dies at any time: the same events, each once."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import pytest

from engine.sampling_params import SamplingParams
from serve.cluster.rerun import MAX_DEATHS, WorkerLost, generate_with_reruns, with_heartbeats
from serve.cluster.saturated_workers import SaturatedWorkers
from serve.messages import Finished, GeneratedImage, GenerationEvent, GenerationJob, Partial, Progress, Queued, Refused

JOB = GenerationJob("r", "k", "빨강", SamplingParams(seed=7, candidates=1, top=1), deadline_s=30.0)
DONE = Finished((GeneratedImage(0, 7, 1, None, None, None, {}, b"png"),), 3, 0, 64)
WHOLE: list[GenerationEvent] = [
    Queued(1, None),
    Progress(16, 64),
    Partial(0, 0, 2, 8, b"first"),
    Progress(32, 64),
    Partial(0, 1, 4, 8, b"second"),
    Progress(64, 64),
    DONE,
]

Step = (
    GenerationEvent | None | BaseException | float
)  # an event, a heartbeat, an exception, or so many seconds of silence
Attempts = list[list[Step]]


class Workers:
    """Plays one list of steps for each time that a job is sent; the last is played for all further ones."""

    def __init__(self, *attempts: list[Step]) -> None:
        self.attempts = list(attempts)
        self.jobs: list[GenerationJob] = []
        self.num_closed = 0

    async def send(self, job: GenerationJob) -> AsyncGenerator[GenerationEvent | None, None]:
        steps = self.attempts[min(len(self.jobs), len(self.attempts) - 1)]
        self.jobs.append(job)
        try:
            for step in steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.num_closed += 1


def events_of(
    workers: Workers,
    job: GenerationJob = JOB,
    *,
    silence_s: float = 5.0,
    saturated_workers: SaturatedWorkers | None = None,
) -> tuple[list[GenerationEvent], int]:
    reruns: list[int] = []

    async def collect() -> list[GenerationEvent]:
        return [
            event
            async for event in generate_with_reruns(
                workers.send,
                job,
                on_rerun=lambda: reruns.append(1),
                saturated_workers=saturated_workers,
                silence_s=silence_s,
            )
        ]

    return asyncio.run(collect()), len(reruns)


@pytest.mark.parametrize("died_after", range(len(WHOLE)))
def test_a_worker_that_dies_after_any_event_changes_no_delivered_event(died_after: int) -> None:
    first: list[Step] = [None, *WHOLE[:died_after], WorkerLost("killed")]
    workers = Workers(first, [None, *WHOLE])
    delivered, num_reruns = events_of(workers)
    assert [event for event in delivered if not isinstance(event, Queued)] == WHOLE[1:]
    assert num_reruns == 1
    assert workers.num_closed == 2


def test_a_rerun_is_the_same_job_with_the_rest_of_its_time() -> None:
    workers = Workers([None, 0.3, WorkerLost("killed")], [None, DONE])
    events_of(workers)
    first, second = workers.jobs
    assert 0 < second.deadline_s < first.deadline_s - 0.3
    assert {**vars(second), "deadline_s": 0} == {**vars(first), "deadline_s": 0}


def test_a_silent_worker_is_given_up_and_its_call_is_closed() -> None:
    workers = Workers([None, Progress(16, 64), 60.0], [None, DONE])
    delivered, num_reruns = events_of(workers, silence_s=0.05)
    assert delivered == [Progress(16, 64), DONE]
    assert num_reruns == 1
    assert workers.num_closed == 2


@pytest.mark.slow
def test_a_worker_that_sends_heartbeats_is_waited_for() -> None:
    steps: list[Step] = [None, *[0.3, None] * 4, DONE]
    workers = Workers(steps)
    assert events_of(workers, silence_s=1.0) == ([DONE], 0)
    assert len(workers.jobs) == 1


def test_a_job_that_kills_its_workers_is_given_up() -> None:
    workers = Workers([None, WorkerLost("killed")])
    delivered, num_reruns = events_of(workers)
    assert [event.reason for event in delivered if isinstance(event, Refused)] == ["failed"]
    assert len(workers.jobs) == MAX_DEATHS
    assert num_reruns == MAX_DEATHS - 1


def test_workers_that_never_accepted_the_job_do_not_count_as_deaths() -> None:
    lost: Attempts = [[WorkerLost("no connection")] for _ in range(MAX_DEATHS + 2)]
    workers = Workers(*lost, [None, DONE])
    assert events_of(workers) == ([DONE], 0)


def test_no_worker_in_time_is_a_deadline() -> None:
    workers = Workers([60.0])
    job = GenerationJob("r", "k", "빨강", SamplingParams(seed=7, candidates=1, top=1), deadline_s=0.3)
    delivered, _ = events_of(workers, job, silence_s=0.1)
    assert [event.reason for event in delivered if isinstance(event, Refused)] == ["deadline"]


@pytest.mark.parametrize("reason", ["draining", "queue_full"])
def test_a_worker_that_has_no_room_sends_the_job_to_one_other(reason: str) -> None:
    refused = Refused(reason, retry_after_s=3.0)  # type: ignore[arg-type]
    assert events_of(Workers([None, refused], [None, DONE]))[0] == [DONE]
    both = Workers([None, refused])
    assert events_of(both)[0] == [refused]
    assert len(both.jobs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["draining", "queue_full"])
def test_an_accepted_job_waits_for_room_when_its_worker_died(reason: str) -> None:
    full: list[Step] = [None, Refused(reason, retry_after_s=3.0)]  # type: ignore[arg-type]
    workers = Workers([None, Progress(16, 64), WorkerLost("killed")], full, full, full, [None, DONE])
    assert events_of(workers) == ([Progress(16, 64), DONE], 1)
    never = Workers([None, WorkerLost("killed")], full)
    job = GenerationJob("r", "k", "빨강", SamplingParams(seed=7, candidates=1, top=1), deadline_s=0.5)
    assert [event.reason for event in events_of(never, job)[0] if isinstance(event, Refused)] == ["deadline"]


@pytest.mark.parametrize("reason", ["deadline", "invalid", "failed"])
def test_any_other_refusal_is_final(reason: str) -> None:
    refused = Refused(reason)  # type: ignore[arg-type]
    workers = Workers([None, refused], [None, DONE])
    assert events_of(workers)[0] == [refused]


def test_events_that_stop_without_an_end_are_a_death() -> None:
    assert events_of(Workers([None, Progress(16, 64)], [None, DONE])) == ([Progress(16, 64), DONE], 1)


def test_an_exception_of_the_workers_own_code_is_not_rerun() -> None:
    workers = Workers([None, ZeroDivisionError("a bug")], [None, DONE])
    with pytest.raises(ZeroDivisionError):
        events_of(workers)
    assert len(workers.jobs) == 1


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_client_that_disconnects_closes_the_call(how: str) -> None:
    workers = Workers([None, Progress(16, 64), 60.0])

    async def disconnect() -> None:
        events = generate_with_reruns(workers.send, JOB, on_rerun=lambda: None)
        assert isinstance(events, AsyncGenerator)
        async with aclosing(events):
            assert await anext(events) == Progress(16, 64)
            if how == "cancelled":
                pending = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.01)
                pending.cancel()
                await asyncio.wait({pending})
        assert workers.num_closed == 1

    asyncio.run(disconnect())


# ------------------------------------------------------------------------------------------------- the worker's side


def with_heartbeats_of(
    source: Callable[[], AsyncGenerator[GenerationEvent, None]], *, heartbeat_s: float
) -> list[GenerationEvent | None]:
    async def collect() -> list[GenerationEvent | None]:
        return [event async for event in with_heartbeats(source(), heartbeat_s=heartbeat_s)]

    return asyncio.run(collect())


def test_heartbeats_come_at_once_and_while_the_worker_computes() -> None:
    async def slow() -> AsyncGenerator[GenerationEvent, None]:
        await asyncio.sleep(0.3)
        yield DONE

    events = with_heartbeats_of(slow, heartbeat_s=0.02)
    assert len(events) > 2, "one at once, and more before the event"
    assert events == [None] * (len(events) - 1) + [DONE]


def test_heartbeats_do_not_disturb_the_events() -> None:
    async def quick() -> AsyncGenerator[GenerationEvent, None]:
        for event in WHOLE:
            yield event

    assert with_heartbeats_of(quick, heartbeat_s=10.0) == [None, *WHOLE]


def test_closing_the_heartbeats_closes_the_job() -> None:
    closed: list[str] = []

    async def endless() -> AsyncGenerator[GenerationEvent, None]:
        try:
            await asyncio.sleep(60)
            yield DONE
        finally:
            closed.append("job")

    async def disconnect() -> None:
        async with aclosing(with_heartbeats(endless(), heartbeat_s=0.01)) as events:
            assert await anext(events) is None
            assert await anext(events) is None
        assert closed == ["job"]

    asyncio.run(disconnect())


def test_without_the_record_of_delivered_events_a_client_would_get_one_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.cluster.rerun._Delivered.is_new", lambda self, event: True)
    delivered, _ = events_of(Workers([None, *WHOLE[:3], WorkerLost("killed")], [None, *WHOLE]))
    assert sum(event == WHOLE[2] for event in delivered) == 2


@pytest.mark.slow
def test_without_the_silence_timeout_an_unreachable_worker_would_take_the_whole_deadline() -> None:
    workers = Workers([None, 0.5, WorkerLost("detected late")], [None, DONE])
    job = GenerationJob("r", "k", "빨강", SamplingParams(seed=7, candidates=1, top=1), deadline_s=0.4)
    assert [event.reason for event in events_of(workers, job)[0] if isinstance(event, Refused)] == ["deadline"]
    workers = Workers([None, 0.5, WorkerLost("detected late")], [None, DONE])
    assert events_of(workers, job, silence_s=0.1)[0] == [DONE]
