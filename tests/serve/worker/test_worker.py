"""A worker: the pipeline's images in any batch, events, refusals, cancellation, failures."""

import asyncio
import io
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.image_files import to_uint8
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.rendition import Rendition, render
from engine.sampling_params import SamplingParams
from serve.messages import Finished, GenerationEvent, GenerationJob, Partial, Progress, Refused
from serve.settings import ServeSettings
from serve.worker.previews import blank_missing, fill_rows, preview_rows
from serve.worker.request_state import RequestState
from serve.worker.worker import Worker

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모", "노랑 바탕에 검정 네모"]
JOB = GenerationJob(
    "one", "key", CAPTIONS[0], SamplingParams(seed=5, candidates=4, top=2), deadline_s=60.0, wants_all=True
)


def _job(*, candidates: int, top: int = 2, **more: Any) -> GenerationJob:
    """`JOB` with another number of candidates."""
    return replace(JOB, sampling_params=JOB.sampling_params.updated(candidates=candidates, top=top), **more)


@pytest.fixture(scope="module")
def pipeline(settings: ServeSettings) -> Pipeline:
    return Pipeline.from_pretrained(settings.model)


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


@pytest.mark.parametrize("mark", ["", "AI"])
def test_a_rendition_is_made_from_the_generated_image_and_stated_in_it(
    make_worker: Callable[..., Worker], pipeline: Pipeline, mark: str
) -> None:
    worker, rendition = make_worker(visible_mark=mark), Rendition(80, True)
    job = replace(JOB, rendition=rendition)
    generation = pipeline([job.caption], job.sampling_params)[0]
    for ours, theirs in zip(_run(_finished(worker, job)).images, generation.candidates, strict=True):
        assert ours.data is not None
        with Image.open(io.BytesIO(ours.data)) as image:
            wanted = render(theirs.image, replace(rendition, visible_mark=mark), ground=pipeline.ground)
            assert (image.mode, image.tobytes()) == ("RGBA", wanted.tobytes())
        assert ours.provenance == read_metadata(ours.data)
        assert ours.provenance["rendition"] == {
            "size": 80, "enlarged_from": 32, "background": "transparent", "visible_mark": mark,
        }  # fmt: skip


def test_a_server_with_a_key_signs_what_it_returns(
    make_worker: Callable[..., Worker], signer: tuple[Path, Path]
) -> None:
    worker = make_worker(c2pa_certificates=str(signer[0]), c2pa_key=str(signer[1]))
    for one in _run(_finished(worker, replace(JOB, image_format="webp"))).images:
        assert one.data is not None
        with c2pa.Reader("image/webp", io.BytesIO(one.data)) as reader:
            assert reader.get_validation_state() == "Valid"
        assert read_metadata(one.data) == one.provenance


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
