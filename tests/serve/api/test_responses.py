import base64
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from engine.data.prompt_words import PromptWords, UnknownWord
from engine.pipeline.rendition import Rendition
from engine.sampling_params import SamplingParams
from serve.api import application
from serve.api.application import build_api
from serve.api.responses import ResponseContext, finished_events, partial_event, response_body, usage
from serve.messages import GenerationEvent, GenerationJob, Partial
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, finished, made, post_json, serving

CONTEXT = ResponseContext(
    "image_edit", "req_1", 'a "model"', 32, 64, PromptWords(5, 1, 4, 3, (UnknownWord("레두", 0, 2),))
)
JOB = GenerationJob("r", "k", "c", SamplingParams(seed=2**64 - 1, candidates=3, top=2), deadline_s=9.0, wants_all=True)


def test_a_response_is_json_with_every_image_complete() -> None:
    data = bytes(range(256)) * 5
    answer = json.loads(response_body(JOB, finished(JOB, data=data), CONTEXT))
    assert [base64.b64decode(one["b64_json"]) for one in answer["data"] + answer["candidates"]] == [data] * 3
    assert answer["data"][1] == {
        "seed": 2**64 - 1, "candidate": 1, "rank": 2, "clip_score": 0.5,
        "clip_score_percentile": None, "contrast": None, "log_likelihood": None,
        "provenance": made(JOB, 1),
        "b64_json": base64.b64encode(data).decode(),
    }  # fmt: skip
    assert (answer["model"], answer["request_id"], answer["size"]) == ('a "model"', "req_1", "32x32")
    plain = replace(JOB, wants_all=False)
    assert "candidates" not in json.loads(response_body(plain, finished(plain), CONTEXT))


def test_enlarged_and_cut_out_images_are_said_to_be_and_previews_are_not() -> None:
    job = replace(JOB, rendition=Rendition(512, True))
    answer = json.loads(response_body(job, finished(job), CONTEXT))
    assert (answer["size"], answer["enlarged_from"], answer["background"]) == ("512x512", "32x32", "transparent")
    events = [partial_event(Partial(0, 0, 2, 8, b"-"), job, CONTEXT), *finished_events(finished(job), job, CONTEXT)]
    fields = [json.loads(event.decode().partition("data: ")[2]) for event in events]
    assert [(one["size"], one["background"]) for one in fields] == [("32x32", "opaque")] + 3 * [
        ("512x512", "transparent")
    ]
    plain = json.loads(response_body(JOB, finished(JOB), CONTEXT))
    assert (plain["size"], plain["enlarged_from"], plain["background"]) == ("32x32", None, "opaque")


def test_input_tokens_are_those_of_the_caption_and_the_init_image() -> None:
    counts = usage(finished(JOB), CONTEXT)
    assert counts["input_tokens"] == 5 + 64
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"] == 69 + 3 * 64


def test_an_event_is_two_lines_whatever_it_contains() -> None:
    context = replace(CONTEXT, model_id="a\nb\r\u2028")
    events = [partial_event(Partial(1, 2, 3, 8, b"\n\n"), JOB, CONTEXT), *finished_events(finished(JOB), JOB, context)]
    for event in events:
        name, data, *rest = event.decode().split("\n")
        assert rest == ["", ""]
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert [event.split()[1] for event in events] == [
        b"image_edit.partial_image", b"image_edit.candidate", b"image_edit.completed", b"image_edit.completed",
    ]  # fmt: skip


def test_a_score_that_is_not_a_number_is_never_sent() -> None:
    done = finished(JOB)
    broken = replace(done, images=(replace(done.images[0], score=float("nan")), *done.images[1:]))
    with pytest.raises(ValueError, match="JSON compliant"):
        response_body(JOB, broken, CONTEXT)


@pytest.mark.parametrize("in_a_thread", [True, False])
def test_large_responses_are_encoded_in_a_thread(monkeypatch: pytest.MonkeyPatch, in_a_thread: bool) -> None:
    """While a response is encoded the event loop answers other requests; encoded on the loop, it would not."""
    started, release = threading.Event(), threading.Event()

    async def large(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        yield finished(job, data=b"x" * 100_000)

    def encode(*_: object) -> bytes:
        started.set()
        release.wait(10)
        return b"{}"

    monkeypatch.setattr(application, "_IN_A_THREAD_BYTES", 256 * 1024 if in_a_thread else 10**12)
    monkeypatch.setattr(application, "response_body", encode)
    app = build_api(ScriptedPool(large), ServeSettings(page=False))
    with serving(app) as port, ThreadPoolExecutor(2) as threads:
        response = threads.submit(post_json, port, "/v1/images/generations", {"prompt": "a", "n": 10})
        assert started.wait(10)
        other = threads.submit(ask, port, "GET", "/healthz")
        if in_a_thread:
            assert other.result(timeout=10).status == 200
            assert not response.done()
        else:
            with pytest.raises(TimeoutError):
                other.result(timeout=0.3)
        release.set()
        assert response.result(timeout=10).status == other.result(timeout=10).status == 200
