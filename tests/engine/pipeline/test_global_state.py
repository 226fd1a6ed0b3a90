"""Images do not depend on torch's global state, on the thread or on the process that makes them."""

import contextlib
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipeline.generation import Generation
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]
Outcome = list[tuple[Any, ...]]


def _outcome(pipeline: Pipeline) -> Outcome:
    """Tokens, pixels, scores and continued captions of mixed requests."""
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = np.zeros((32, 32), np.uint8)
    mask[5:14, 9:22] = 255
    guided = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, guidance_scale=2.0, candidates=3, seed=2**63 + 1)
    hole = InitImage(photo, mask_image=Image.fromarray(mask))
    generations = [
        *pipeline(CAPTIONS, candidates=5, seed=5),
        *pipeline(CAPTIONS[:1], candidates=1, seed=5),
        *pipeline(CAPTIONS, guided),
        *pipeline(CAPTIONS[:1], candidates=2, init_image=hole, rank_by="log_likelihood"),
    ]
    lines = pipeline.continue_caption("빨강", count=3, seed=2)
    return [*_candidates(generations), *((line.text, line.text_tokens) for line in lines)]


def _candidates(generations: list[Generation]) -> Outcome:
    return [
        (one.candidate, one.image_tokens, np.asarray(one.image).tobytes(), one.score, one.log_likelihood)
        for generation in generations
        for one in generation.candidates
    ]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float16": lambda: _default_dtype(torch.float16),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: _default_device("meta"),
}


@pytest.fixture(scope="module")
def model(kodalle_run: Path) -> Path:
    return kodalle_run / "model"


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> Outcome:
    found = _outcome(pipeline)
    assert len({one[1] for one in found}) > 10, "one image for all candidates would be equal to itself"
    return found


@pytest.mark.parametrize("state", STATES)
def test_a_loaded_pipeline_is_the_same(state: str, pipeline: Pipeline, expected: Outcome) -> None:
    with STATES[state]():
        assert _outcome(pipeline) == expected


@pytest.mark.parametrize("state", STATES)
def test_a_pipeline_loaded_there_is_the_same(state: str, model: Path, expected: Outcome) -> None:
    with STATES[state]():
        assert _outcome(Pipeline.from_pretrained(model)) == expected
    assert _outcome(_loaded_in(state, model)) == expected


def _loaded_in(state: str, model: Path) -> Pipeline:
    with STATES[state]():
        return Pipeline.from_pretrained(model)


def test_int8_is_the_same(model: Path) -> None:
    expected = _outcome(Pipeline.from_pretrained(model, int8=True))
    with _default_dtype(torch.float16), torch.autocast("cpu", torch.bfloat16):
        assert _outcome(Pipeline.from_pretrained(model, int8=True)) == expected


def test_several_threads_at_once(pipeline: Pipeline, expected: Outcome) -> None:
    found: list[Outcome] = []
    threads = [threading.Thread(target=lambda: found.append(_outcome(pipeline))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_after_pickling(pipeline: Pipeline, expected: Outcome) -> None:
    again = pickle.loads(pickle.dumps(pipeline))
    assert _outcome(again) == expected
    assert again.model_record == pipeline.model_record


def _in_child(pipeline: Pipeline, connection: Any) -> None:
    torch_before = torch.get_num_threads()
    found = _outcome(pipeline)
    torch.ones(2**20, dtype=torch.float32, device="cpu").exp()  # what a larger model computes
    assert torch_before > torch.get_num_threads() == 1
    connection.send(found)


def test_a_forked_child(pipeline: Pipeline, expected: Outcome) -> None:
    """torch's threads do not survive a fork: the child's first parallel operation would wait for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20, dtype=torch.float32, device="cpu").exp()  # the threads are there before the fork
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(pipeline, theirs), daemon=True)
    child.start()
    try:
        assert ours.poll(120), "the child hangs"
        found = ours.recv()
    finally:
        child.kill()
        child.join()
        torch.set_num_threads(threads)
    assert found == expected
