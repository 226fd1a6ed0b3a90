"""Long work of a worker for one job ends soon after the job: hung up, or past its deadline."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipeline.init_image import InitImage
from engine.sampling_params import SamplingParams
from serve.messages import Finished, Refused
from serve.worker import request_state
from serve.worker.worker import Worker
from tests.serve.worker.test_worker import CAPTIONS, JOB, _events, _run

SIZE = 32
HOLE = np.zeros((SIZE, SIZE), dtype=bool)
HOLE[:16, 8:24] = True


def picture() -> Image.Image:
    grid = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(2))
    return Image.fromarray((255 * grid).byte().numpy()).resize((SIZE, SIZE))


def mask() -> Image.Image:
    """White where the image is generated anew."""
    return Image.fromarray((255 * HOLE).astype(np.uint8))


PATIENT = replace(JOB, deadline_s=600.0)
LOCKED = replace(PATIENT, caption=CAPTIONS[1], init_image=InitImage(picture(), changed_from=CAPTIONS[0]))
LIKELIHOOD = replace(
    PATIENT,
    sampling_params=SamplingParams(seed=5, candidates=3),
    init_image=InitImage(picture(), mask_image=mask()),
    rank_by="log_likelihood",
)
MANY = replace(PATIENT, sampling_params=SamplingParams(seed=5, candidates=20, top=1), wants_all=False)  # two parts
# What the job takes long in: the object whose method is called for each part, by the path from the worker.
WORK = {
    "changed words": (LOCKED, "pipeline.transformer", "logits"),
    "likelihoods": (LIKELIHOOD, "pipeline.transformer", "logits"),
    "decoding": (MANY, "pipeline._codec.decoder", "decode"),
    "ranking": (MANY, "pipeline._scorer._embedder", "embed_images"),
}


@contextmanager
def counted(worker: Worker, path: str, name: str, at_call: Callable[[int], None]) -> Iterator[list[int]]:
    """Counts calls of a method, and calls `at_call` with each one's number."""
    owner: Any = worker
    for part in path.split("."):
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        at_call(calls[0])
        return whole(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


@pytest.mark.parametrize("name", WORK)
def test_it_ends_when_the_client_hangs_up(worker: Worker, name: str) -> None:
    job, path, method = WORK[name]

    async def hang_up_at(number: int) -> list[int]:
        loop = asyncio.get_running_loop()

        def at_call(call: int) -> None:
            if call == number:
                loop.call_soon_threadsafe(reader.cancel)
                while not reader.done():
                    time.sleep(0.001)

        with counted(worker, path, method, at_call) as calls:
            reader = asyncio.create_task(_events(worker, job))
            await asyncio.wait([reader])
            await worker.drain()
            worker.is_draining = False
            await asyncio.wrap_future(worker._postprocessor.call(lambda: None))  # behind whatever is left of the job
        if not reader.cancelled():
            assert isinstance(reader.result()[-1], Finished)
        return calls

    (whole,), (ended,) = _run(hang_up_at(-1), 300.0), _run(hang_up_at(1), 300.0)
    assert whole > 1, "else there is nothing to end"
    assert ended == 1, f"of {whole}"


@pytest.mark.parametrize("name", WORK)
def test_it_ends_at_the_deadline(worker: Worker, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    job, path, method = WORK[name]
    late_s = [0.0]
    monkeypatch.setattr(request_state, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_s[0]))

    def at_call(call: int) -> None:
        late_s[0] = job.deadline_s if call == 1 else late_s[0]

    with counted(worker, path, method, at_call) as calls:
        last = _run(_events(worker, job), 300.0)[-1]
    assert isinstance(last, Refused)
    assert last.reason == "deadline"
    assert calls == [1]
    assert worker.num_active == 0


def test_an_init_image_of_a_job_that_is_over_is_not_read(worker: Worker) -> None:
    async def cancelled() -> list[int]:
        with counted(worker, "pipeline.vqgan", "encode", lambda _: None) as calls:
            events = worker.generate(LOCKED)
            blocked = asyncio.Event()
            loop = asyncio.get_running_loop()
            held = worker._postprocessor.call(lambda: asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result())
            while not held.running():
                await asyncio.sleep(0.001)
            reader = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
            blocked.set()
            await asyncio.wrap_future(worker._postprocessor.call(lambda: None))
        return calls

    assert _run(cancelled(), 300.0) == [0]
