"""A drawer draws what the pipeline draws, beside anybody, and lets go of its slots whatever ends a drawing."""

import asyncio
import io
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.pipeline.image_files import to_uint8
from engine.pipeline.init_image import GivenImage
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingOptions
from serve.messages import DrawEvent, DrawJob, Finished, GivenPixels, Partial, Progress, Queued, Refused
from serve.settings import ServeSettings
from serve.worker.image_encoding import read_metadata
from serve.worker.previews import fill_rows, plain_undrawn, preview_rows
from serve.worker.worker import Drawer, DrawerFailed

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모", "노랑 바탕에 검정 네모"]
JOB = DrawJob("one", "somebody", CAPTIONS[0], seed=5, num_candidates=4, num_images=2, deadline_s=60.0, wants_all=True)


@pytest.fixture(scope="module")
def settings(kodalle_run: Path) -> ServeSettings:
    return ServeSettings(model=str(kodalle_run / "model"), num_slots=6, max_queued_rows=64)


@pytest.fixture(scope="module")
def pipeline(settings: ServeSettings) -> Pipeline:
    return Pipeline.from_pretrained(settings.model)


@pytest.fixture
def make_drawer(settings: ServeSettings) -> Iterator[Callable[..., Drawer]]:
    drawers = []

    def make(**changes: Any) -> Drawer:
        drawers.append(Drawer(settings.model_copy(update=changes)))
        return drawers[-1]

    yield make
    for drawer in drawers:
        drawer.close()


async def _events(drawer: Drawer, job: DrawJob) -> list[DrawEvent]:
    return [event async for event in drawer.draw(job)]


async def _finished(drawer: Drawer, job: DrawJob) -> Finished:
    last = (await _events(drawer, job))[-1]
    assert isinstance(last, Finished), last
    return last


def _run(drawing: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await drawing

    return asyncio.run(bounded())


def _pixels(data: bytes | None) -> NDArray[np.uint8]:
    assert data is not None
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _expect_pipelines(drawn: Finished, pipeline: Pipeline, job: DrawJob, given: GivenImage | None = None) -> None:
    drawing = pipeline(
        [job.caption],
        candidates=job.num_candidates,
        seed=job.seed,
        options=job.options,
        given=given,
        rank_by=job.rank_by,
    )[0]
    assert [one.candidate for one in drawn.images] == [one.candidate for one in drawing.candidates]
    for ours, theirs in zip(drawn.images, drawing.candidates, strict=True):
        assert (ours.rank, ours.seed) == (theirs.rank, theirs.seed)
        assert ours.score == pytest.approx(theirs.score, abs=1e-6)
        assert ours.fit == theirs.fit
        assert np.array_equal(_pixels(ours.data), np.asarray(theirs.image))


def _mixed_jobs() -> list[DrawJob]:
    options = [
        SamplingOptions(),
        SamplingOptions(temperature=0.8, top_k=9),
        SamplingOptions(guidance_scale=2.0),
        SamplingOptions(top_p=0.9),
    ]
    return [
        replace(JOB, request_id=f"job {number}", caption=CAPTIONS[number % 3], seed=number // 2,
                num_candidates=1 + number % 5, num_images=1, options=options[number % 4], key_id=f"key {number % 2}")
        for number in range(12)
    ]  # fmt: skip


def test_a_job_gives_the_pipelines_pictures(make_drawer: Callable[..., Drawer], pipeline: Pipeline) -> None:
    drawn = _run(_finished(make_drawer(), JOB))
    _expect_pipelines(drawn, pipeline, JOB)
    assert drawn.timings_s.keys() == {"queue", "prefill", "decode", "vqgan", "ranking", "encoding", "total"}
    assert drawn.timings_s["total"] >= sum(value for name, value in drawn.timings_s.items() if name != "total") * 0.9
    assert drawn.image_tokens == 4 * 64
    assert drawn.tokens_cut == 0


def test_many_at_once_give_what_each_gives_alone(make_drawer: Callable[..., Drawer], pipeline: Pipeline) -> None:
    """Six slots, 36 rows, some of them guided: requests wait, join between steps and leave."""
    jobs, drawer = _mixed_jobs(), make_drawer()

    async def together() -> list[Finished]:
        return await asyncio.gather(*(_finished(drawer, job) for job in jobs))

    for job, drawn in zip(jobs, _run(together()), strict=True):
        _expect_pipelines(drawn, pipeline, job)
        alone = _run(_finished(drawer, job))
        assert [one.data for one in drawn.images] == [one.data for one in alone.images]
    assert drawer.slots_in_use == drawer.queued_rows == drawer.num_active == 0


@pytest.mark.skipif(sys.platform != "linux", reason="nice values of threads are Linux's")
def test_drawing_stands_behind_answering(make_drawer: Callable[..., Drawer]) -> None:
    """What shares the cores with a drawing has microseconds to do, and somebody waits for it."""
    make_drawer()
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    nice = {one.name: os.getpriority(os.PRIO_PROCESS, one.native_id or 0) for one in threading.enumerate()}
    assert nice["stepper"] > mine
    assert nice["pictures"] > mine


def test_bytes_do_not_depend_on_how_many_are_asked(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()
    many, one = (_run(_finished(drawer, replace(JOB, num_candidates=n, num_images=n))) for n in (5, 1))
    (only,) = one.images
    assert only.data in [image.data for image in many.images if image.candidate == only.candidate == 0]


@pytest.mark.parametrize(("image_format", "compression"), [("png", 100), ("webp", 100), ("jpeg", 95)])
def test_formats_carry_how_the_picture_was_made(
    make_drawer: Callable[..., Drawer], image_format: Any, compression: int
) -> None:
    drawer = make_drawer()
    drawn = _run(_finished(drawer, replace(JOB, image_format=image_format, compression=compression)))
    for one in drawn.images:
        assert one.data is not None
        found = read_metadata(one.data)
        assert (found["caption"], found["seed"], found["candidate"]) == (CAPTIONS[0], 5, one.candidate)
        assert found["model_digest"] == drawer.info.digest
        assert Image.open(io.BytesIO(one.data)).format == image_format.upper()


def test_pictures_that_nobody_asked_for_are_not_encoded(make_drawer: Callable[..., Drawer]) -> None:
    drawn = _run(_finished(make_drawer(), replace(JOB, wants_all=False)))
    assert [one.data is not None for one in drawn.images] == [True, True, False, False]


@pytest.mark.parametrize("rank_by", ["koclip", "fit"])
def test_a_repainted_picture_is_the_pipelines(
    make_drawer: Callable[..., Drawer], pipeline: Pipeline, rank_by: Any
) -> None:
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (10, 8, 30, 20))
    given = GivenImage(photo, mask_image=mask)
    size, g = pipeline.vqgan.config.image_size, pipeline.vqgan.config.grid_size
    pixels = GivenPixels(
        given.pixels(size).tobytes(), given.redrawn_pixels(size, g).tobytes(), given.redrawn_tokens(size, g).tobytes()
    )
    job = replace(JOB, given=pixels, rank_by=rank_by, num_partials=3)
    drawn = _run(_finished(make_drawer(), job))
    _expect_pipelines(drawn, pipeline, job, given)
    assert drawn.image_tokens == 4 * int(given.redrawn_tokens(size, g).sum())


def test_ranking_by_fit_with_nothing_after_the_hole_is_refused(make_drawer: Callable[..., Drawer]) -> None:
    redrawn = np.arange(64) >= 32  # the lower half
    pixels = GivenPixels(bytes(32 * 32 * 3), bytes(32 * 32), redrawn.astype(np.uint8).tobytes())
    drawer = make_drawer()
    (last,) = _run(_events(drawer, replace(JOB, given=pixels, rank_by="fit")))
    assert isinstance(last, Refused)
    assert (last.reason, last.param) == ("invalid", "rank_by")
    assert drawer.slots_in_use == 0


def test_partial_pictures_are_decoded_from_the_rows_so_far(
    make_drawer: Callable[..., Drawer], pipeline: Pipeline
) -> None:
    drawer = make_drawer()
    job = replace(JOB, num_partials=7, num_candidates=6, num_images=2, wants_progress=True)
    events = _run(_events(drawer, job))
    partials = [event for event in events if isinstance(event, Partial)]
    plain = _run(_finished(drawer, replace(job, num_partials=0, wants_progress=False)))
    assert [one.data for one in events[-1].images] == [one.data for one in plain.images]
    assert partials, "at least one preview is decoded while six rows of 64 tokens are drawn"
    drawing = pipeline([job.caption], candidates=6, seed=job.seed)[0]
    tokens = {one.candidate: torch.tensor(one.image_tokens) for one in drawing.candidates}
    for partial in partials:
        assert partial.candidate < job.num_images
        assert partial.rows_drawn == preview_rows(7, 8)[partial.partial_index]
        filled = fill_rows(tokens[partial.candidate], rows_drawn=partial.rows_drawn, grid_size=8, given=None)
        images = plain_undrawn(
            pipeline.decode_images(filled[None]), rows_drawn=partial.rows_drawn, grid_size=8, given=None
        )
        assert np.array_equal(_pixels(partial.data), to_uint8(images)[0].numpy())
    progress = [event.tokens_drawn for event in events if isinstance(event, Progress)]
    assert progress == sorted(progress)


async def _slots_after(drawer: Drawer, *, close: bool) -> int:
    """Slots in use one second after somebody who had asked for 40 pictures went away, or did not."""
    drawing: AsyncIterator[DrawEvent] = drawer.draw(replace(JOB, num_candidates=40, num_partials=7, num_images=40))
    await anext(drawing)
    assert drawer.slots_in_use == drawer.num_slots
    if close:
        await drawing.aclose()  # type: ignore[attr-defined]
    begun = time.monotonic()
    while drawer.slots_in_use and time.monotonic() - begun < (1.0 if close else 0.05):
        await asyncio.sleep(0.005)
    return drawer.slots_in_use


def test_a_cancelled_drawing_frees_its_slots(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()
    assert _run(_slots_after(drawer, close=True)) == 0
    assert drawer.num_active == drawer.queued_rows == 0
    assert _run(_finished(drawer, JOB)).images[0].data is not None
    assert _run(_slots_after(drawer, close=False)) == drawer.num_slots, "the control: who stays keeps the slots"


def test_a_task_that_is_cancelled_while_it_waits_frees_its_slots(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()

    async def hang_up() -> None:
        reader = asyncio.create_task(_events(drawer, replace(JOB, num_candidates=40)))
        await asyncio.sleep(0.02)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.sleep(0.3)

    _run(hang_up())
    assert drawer.slots_in_use == drawer.num_active == 0


def test_a_full_queue_refuses_at_once(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer(max_queued_rows=8)

    async def crowd() -> tuple[float, DrawEvent]:
        first = asyncio.create_task(_events(drawer, replace(JOB, request_id="first", num_candidates=14)))
        await asyncio.sleep(0.02)
        begun = time.monotonic()
        (refused,) = await _events(drawer, replace(JOB, request_id="second", num_candidates=4))
        took_s = time.monotonic() - begun
        assert isinstance((await first)[-1], Finished)
        return took_s, refused

    took_s, refused = _run(crowd())
    assert isinstance(refused, Refused)
    assert refused.reason == "queue_full"
    assert refused.retry_after_s is not None
    assert took_s < 0.1


def test_who_waits_is_told_the_place_in_the_queue(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()

    async def crowd() -> list[DrawEvent]:
        others = [
            asyncio.create_task(_events(drawer, replace(JOB, request_id=f"{number}", num_candidates=6)))
            for number in range(3)
        ]
        await asyncio.sleep(0.01)
        events = await _events(drawer, replace(JOB, request_id="last", wants_progress=True))
        await asyncio.gather(*others)
        return events

    events = _run(crowd())
    places = [event.position for event in events if isinstance(event, Queued)]
    assert places, "three others wait or draw"
    assert places == sorted(places, reverse=True)
    assert isinstance(events[-1], Finished)


def test_a_deadline_ends_a_drawing(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()
    (refused,) = _run(_events(drawer, replace(JOB, num_candidates=60, deadline_s=0.03)))
    assert isinstance(refused, Refused)
    assert refused.reason == "deadline"
    assert drawer.slots_in_use == 0


async def _seconds_of_the_admitted(drawer: Drawer, job: DrawJob, count: int) -> list[float]:
    """When each of `count` requests, asked for at once, had its pictures; refused ones left out."""
    begun = time.monotonic()

    async def one(number: int) -> float | None:
        events = await _events(drawer, replace(job, request_id=f"{number}"))
        return time.monotonic() - begun if isinstance(events[-1], Finished) else None

    return [seconds for seconds in await asyncio.gather(*(one(number) for number in range(count))) if seconds]


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "control"])
def test_nobody_is_promised_pictures_that_come_too_late(
    make_drawer: Callable[..., Drawer], monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """Decoding takes ten times as long as the steps, and most requests are refused for it."""
    drawer = make_drawer(num_slots=32)
    decode = drawer.pipeline.decode_images

    def slowly(image_tokens: torch.Tensor, **named: Any) -> torch.Tensor:
        time.sleep(0.25 * len(image_tokens))
        return decode(image_tokens, **named)

    monkeypatch.setattr(drawer.pipeline, "decode_images", slowly)
    job = replace(JOB, num_candidates=2, num_images=1, wants_all=False, deadline_s=4.0)
    _run(_finished(drawer, job))  # what a picture takes is known from here on
    if not is_checked:
        monkeypatch.setattr(drawer._finisher, "expected_s", lambda _: 0.0)
    seconds = _run(_seconds_of_the_admitted(drawer, job, 14))
    if is_checked:
        assert 1 <= len(seconds) < 14
        assert max(seconds) < job.deadline_s
    else:
        assert max(seconds) > job.deadline_s


def test_a_draining_drawer_ends_what_it_began(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()

    async def drain() -> tuple[list[DrawEvent], list[DrawEvent]]:
        running = asyncio.create_task(_events(drawer, replace(JOB, num_candidates=12)))
        await asyncio.sleep(0.02)
        draining = asyncio.create_task(drawer.drain())
        await asyncio.sleep(0)
        late = await _events(drawer, replace(JOB, request_id="late"))
        await draining
        assert running.done()
        return await running, late

    begun, late = _run(drain())
    assert isinstance(begun[-1], Finished)
    assert isinstance(late[0], Refused)
    assert late[0].reason == "draining"


def test_a_dead_stepping_thread_is_unhealthy_and_tells_everybody(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()
    drawer.check_health()
    drawer._stepper._look = None  # type: ignore[assignment, method-assign]  # calling it raises on the thread
    (refused,) = _run(_events(drawer, JOB))
    assert isinstance(refused, Refused)
    assert refused.reason == "failed"
    with pytest.raises(DrawerFailed, match="died"):
        drawer.check_health()


def test_one_drawings_bad_picture_is_its_own_failure(
    make_drawer: Callable[..., Drawer], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = make_drawer()
    decode = drawer.pipeline.decode_images
    broken = [True]

    def fails_once(*arguments: Any, **named: Any) -> Any:
        if broken:
            broken.pop()
            raise RuntimeError("a bad picture")
        return decode(*arguments, **named)

    monkeypatch.setattr(drawer.pipeline, "decode_images", fails_once)
    (refused,) = _run(_events(drawer, JOB))
    assert isinstance(refused, Refused)
    assert refused.reason == "failed"
    assert "bad picture" not in refused.message
    assert _run(_finished(drawer, JOB)).images[0].data is not None
    drawer.check_health()


def test_a_closed_drawer_leaves_nobody_waiting(make_drawer: Callable[..., Drawer]) -> None:
    drawer = make_drawer()

    async def close() -> list[DrawEvent]:
        running = asyncio.create_task(_events(drawer, replace(JOB, num_candidates=60)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(drawer.close)
        return await running

    assert isinstance(_run(close())[-1], Refused)
