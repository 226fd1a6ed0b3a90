"""Imported models behind a worker: the pipeline's images, and classes that there are none of are refused in one line."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.caption_guide import CaptionGuide
from engine.data.prompt_words import PromptReader
from engine.interop.importing import import_checkpoint
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams
from serve.messages import Finished, GenerationEvent, GenerationJob, Refused
from serve.settings import ServeSettings
from serve.worker.worker import Worker, model_info
from tests.engine.interop.test_importing_mindalle import KINDS, write

JOB = GenerationJob(
    "one", "key", "", SamplingParams(seed=5, candidates=3, top=3, top_k=20), deadline_s=60.0, wants_all=True
)


def _last(worker: Worker, job: GenerationJob) -> GenerationEvent:
    async def events() -> list[GenerationEvent]:
        async with asyncio.timeout(60):
            return [event async for event in worker.generate(job)]

    return asyncio.run(events())[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_serves_them(kind: str, tmp_path: Path) -> None:
    import_checkpoint(write(tmp_path / "theirs", kind), tmp_path / "ours")
    caption = "3" if kind == "class" else "ab c d"
    pipeline = Pipeline.from_pretrained(tmp_path / "ours")
    worker = Worker(ServeSettings(model=str(tmp_path / "ours"), num_slots=4, max_queued_sequences=16))
    try:
        finished = _last(worker, replace(JOB, caption=caption))
        assert isinstance(finished, Finished), finished
        for ours, theirs in zip(finished.images, pipeline([caption], JOB.sampling_params)[0].candidates, strict=True):
            assert ours.data is not None
            assert np.array_equal(
                np.asarray(Image.open(io.BytesIO(ours.data)).convert("RGB")), np.asarray(theirs.image)
            )
        if kind == "class":
            refused = _last(worker, replace(JOB, request_id="two", caption="a cat"))
            assert isinstance(refused, Refused)
            assert "is none of the model's 5 classes" in refused.message
            guided = JOB.sampling_params.updated(guidance_scale=2.0)
            refused = _last(worker, replace(JOB, request_id="three", caption="3", sampling_params=guided))
            assert isinstance(refused, Refused)
            assert "needs an empty caption, which this model has none of" in refused.message
            assert isinstance(_last(worker, replace(JOB, request_id="four", caption="4")), Finished)  # it goes on
    finally:
        worker.close()
    tokenizer_json = model_info(pipeline, tmp_path / "ours", name="m").tokenizer_json
    reader = PromptReader(tokenizer_json, CaptionGuide())
    assert reader.read(caption).count == (3 if kind == "text" else 1)
    assert kind == "text" or reader.read("no class of its").count == 1
