"""A worker: the pipeline's images in any batch, events, refusals, cancellation, failures."""

import asyncio
import io
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.image_files import to_uint8
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams
from serve.messages import Finished, GenerationEvent, GenerationJob, Partial, Progress, Queued, Refused
from serve.settings import ServeSettings
from serve.worker.postprocessing import Postprocessor
from serve.worker.previews import blank_missing, fill_rows, preview_rows
from serve.worker.request_state import RequestState
from serve.worker.worker import Worker, WorkerFailed

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모", "노랑 바탕에 검정 네모"]
JOB = GenerationJob(
    "one", "key", CAPTIONS[0], SamplingParams(seed=5, candidates=4, top=2), deadline_s=60.0, wants_all=True
)


def _job(*, candidates: int, top: int = 2, **more: Any) -> GenerationJob:
    """`JOB` with another number of candidates."""
    return replace(JOB, sampling_params=JOB.sampling_params.updated(candidates=candidates, top=top), **more)


@pytest.fixture(scope="module")
def settings(kodalle_run: Path) -> ServeSettings:
    return ServeSettings(model=str(kodalle_run / "model"), num_slots=6, max_queued_sequences=64)


@pytest.fixture(scope="module")
def pipeline(settings: ServeSettings) -> Pipeline:
    return Pipeline.from_pretrained(settings.model)


@pytest.fixture(scope="module")
def worker(settings: ServeSettings) -> Iterator[Worker]:
    """A worker for tests that leave it as they found it."""
    worker = Worker(settings)
    yield worker
    worker.close()


@pytest.fixture
def make_worker(settings: ServeSettings) -> Iterator[Callable[..., Worker]]:
    workers = []

    def make(**changes: Any) -> Worker:
        workers.append(Worker(settings.model_copy(update=changes)))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


async def _events(worker: Worker, job: GenerationJob) -> list[GenerationEvent]:
    return [event async for event in worker.generate(job)]


async def _finished(worker: Worker, job: GenerationJob) -> Finished:
    last = (await _events(worker, job))[-1]
    assert isinstance(last, Finished), last
    return last


def _run(generation: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await generation

    return asyncio.run(bounded())


def _pixels(data: bytes | None) -> NDArray[np.uint8]:
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _assert_equals_pipeline(
    finished: Finished, pipeline: Pipeline, job: GenerationJob, init_image: InitImage | None = None
) -> None:
    generation = pipeline([job.caption], job.sampling_params, init_image=init_image, rank_by=job.rank_by)[0]
    assert [one.candidate for one in finished.images] == [one.candidate for one in generation.candidates]
    for ours, theirs in zip(finished.images, generation.candidates, strict=True):
        assert (ours.rank, ours.seed) == (theirs.rank, theirs.seed)
        assert ours.score == pytest.approx(theirs.score, abs=1e-6)
        assert ours.log_likelihood == theirs.log_likelihood
        assert np.array_equal(_pixels(ours.data), np.asarray(theirs.image))


def _mixed_jobs() -> list[GenerationJob]:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.8, top_k=9),
        SamplingParams(guidance_scale=2.0),
        SamplingParams(top_p=0.9),
    ]
    return [
        replace(JOB, request_id=f"job {number}", caption=CAPTIONS[number % 3], key_id=f"key {number % 2}",
                sampling_params=kinds[number % 4].updated(seed=number // 2, candidates=1 + number % 5, top=1))
        for number in range(12)
    ]  # fmt: skip


def test_a_job_gives_the_pipelines_images(worker: Worker, pipeline: Pipeline) -> None:
    finished = _run(_finished(worker, JOB))
    _assert_equals_pipeline(finished, pipeline, JOB)
    assert finished.timings_s.keys() == {"queue", "prefill", "decode", "vqgan", "ranking", "encoding", "total"}
    assert (
        finished.timings_s["total"] >= sum(value for name, value in finished.timings_s.items() if name != "total") * 0.9
    )
    assert finished.image_tokens == 4 * 64
    assert finished.tokens_cut == 0


def test_concurrent_jobs_give_what_each_gives_alone(worker: Worker, pipeline: Pipeline) -> None:
    """Six slots, 36 sequences, some of them guided: sequences wait, are added between steps and finish."""
    jobs = _mixed_jobs()

    async def together() -> list[Finished]:
        return await asyncio.gather(*(_finished(worker, job) for job in jobs))

    for job, finished in zip(jobs, _run(together()), strict=True):
        _assert_equals_pipeline(finished, pipeline, job)
        alone = _run(_finished(worker, job))
        assert [one.data for one in finished.images] == [one.data for one in alone.images]
    assert worker.slots_in_use == worker.queued_sequences == worker.num_active == 0


@pytest.mark.skipif(sys.platform != "linux", reason="nice values of threads are Linux's")
def test_compute_threads_have_a_lower_priority(worker: Worker) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    nice = {one.name: os.getpriority(os.PRIO_PROCESS, one.native_id or 0) for one in threading.enumerate()}
    assert nice["decode-loop"] > mine
    assert nice["postprocessing"] > mine


def test_bytes_do_not_depend_on_the_number_of_candidates(worker: Worker) -> None:
    many, one = (_run(_finished(worker, _job(candidates=n, top=n))) for n in (5, 1))
    (only,) = one.images
    assert only.data in [image.data for image in many.images if image.candidate == only.candidate == 0]


@pytest.mark.parametrize(("image_format", "compression"), [("png", 100), ("webp", 100), ("jpeg", 95)])
def test_every_format_carries_the_generation_parameters(worker: Worker, image_format: Any, compression: int) -> None:
    finished = _run(_finished(worker, replace(JOB, image_format=image_format, compression=compression)))
    for one in finished.images:
        assert one.data is not None
        found = read_metadata(one.data)
        assert found == one.provenance
        assert (found["caption"], found["seed"], found["candidate"]) == (CAPTIONS[0], 5, one.candidate)
        assert found["model_digest"] == worker.info.digest
        assert Image.open(io.BytesIO(one.data)).format == image_format.upper()


def test_images_that_were_not_requested_are_not_encoded(worker: Worker) -> None:
    finished = _run(_finished(worker, replace(JOB, wants_all=False)))
    assert [one.data is not None for one in finished.images] == [True, True, False, False]


@pytest.mark.parametrize("rank_by", ["koclip", "log_likelihood"])
def test_an_inpainted_image_is_the_pipelines(worker: Worker, pipeline: Pipeline, rank_by: Any) -> None:
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (10, 8, 30, 20))
    init_image = InitImage(photo, mask_image=mask)
    size, g = pipeline.vqgan.config.image_size, pipeline.vqgan.config.grid_size
    job = replace(JOB, init_image=init_image.resized(size, g), rank_by=rank_by, num_partials=3)
    finished = _run(_finished(worker, job))
    _assert_equals_pipeline(finished, pipeline, job, init_image)
    assert finished.image_tokens == 4 * int(init_image.regenerated_tokens(size, g).sum())


def test_ranking_by_log_likelihood_with_nothing_after_the_hole_is_refused(worker: Worker) -> None:
    upper_half_kept = InitImage(Image.new("RGB", (32, 32)), keep_rows=4)
    (last,) = _run(_events(worker, replace(JOB, init_image=upper_half_kept, rank_by="log_likelihood")))
    assert isinstance(last, Refused)
    assert (last.reason, last.param) == ("invalid", "rank_by")
    assert worker.slots_in_use == 0


def test_previews_are_decoded_from_the_rows_so_far(worker: Worker, pipeline: Pipeline) -> None:
    job = _job(candidates=6, num_partials=7, wants_progress=True)
    events = _run(_events(worker, job))
    partials = [event for event in events if isinstance(event, Partial)]
    plain = _run(_finished(worker, replace(job, num_partials=0, wants_progress=False)))
    assert [one.data for one in events[-1].images] == [one.data for one in plain.images]
    generation = pipeline([job.caption], job.sampling_params)[0]
    tokens = {one.candidate: torch.tensor(one.image_tokens) for one in generation.candidates}
    for partial in partials:
        assert partial.candidate < job.num_images
        assert partial.rows_generated == preview_rows(7, 8)[partial.partial_index]
        filled = fill_rows(
            tokens[partial.candidate], rows_generated=partial.rows_generated, grid_size=8, init_tokens=None
        )
        images = blank_missing(
            pipeline.decode_images(filled[None]), rows_generated=partial.rows_generated, grid_size=8, init_tokens=None
        )
        assert np.array_equal(_pixels(partial.data), to_uint8(images)[0].numpy())
    progress = [event.tokens_generated for event in events if isinstance(event, Progress)]
    assert progress == sorted(progress)


class _InlineExecutor:
    """Runs a task in the thread that submits it."""

    def submit(self, run: Callable[..., None], *arguments: Any) -> None:
        run(*arguments)

    def shutdown(self, **_: Any) -> None:
        pass


def test_every_preview_is_sent_when_each_is_decoded_before_the_next_is_due(
    make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker()
    postprocessor = worker._postprocessor

    def at_once(state: RequestState, candidate: int) -> None:
        with torch.inference_mode():
            postprocessor._preview(state, candidate)

    monkeypatch.setattr(postprocessor, "preview", at_once)
    monkeypatch.setattr(postprocessor, "_encoders", _InlineExecutor())
    events = _run(_events(worker, replace(JOB, num_partials=3)))
    sent = [(event.candidate, event.partial_index, event.rows_generated) for event in events[:-1]]
    assert sorted(sent) == [(number, index, rows) for number in (0, 1) for index, rows in enumerate((2, 4, 6))]
    assert [index for number, index, _ in sent if number == 0] == [0, 1, 2]


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
