import base64
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from engine.sampling_params import SamplingParams
from serve.api import application as api_server
from serve.api.application import build_api
from serve.api.responses import AnswerStyle, answer_body, finished_events, partial_event, usage
from serve.messages import GenerationEvent, GenerationJob, Partial
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, finished, made, post_json, serving

STYLE = AnswerStyle("image_edit", "req_1", 'a "model"', 32, 64)
JOB = GenerationJob("r", "k", "c", SamplingParams(seed=2**64 - 1, candidates=3, top=2), deadline_s=9.0, wants_all=True)


def test_an_answer_is_json_with_each_picture_whole() -> None:
    data = bytes(range(256)) * 5
    answer = json.loads(answer_body(JOB, finished(JOB, data=data), STYLE))
    assert [base64.b64decode(one["b64_json"]) for one in answer["data"] + answer["candidates"]] == [data] * 3
    assert answer["data"][1] == {
        "seed": 2**64 - 1, "candidate": 1, "rank": 2, "clip_score": 0.5, "log_likelihood": None,
        "provenance": made(JOB, 1),
        "b64_json": base64.b64encode(data).decode(),
    }  # fmt: skip
    assert (answer["model"], answer["request_id"], answer["size"]) == ('a "model"', "req_1", "32x32")
    plain = replace(JOB, wants_all=False)
    assert "candidates" not in json.loads(answer_body(plain, finished(plain), STYLE))


def test_tokens_read_are_the_captions_and_the_given_pictures() -> None:
    told = usage(finished(JOB), STYLE)
    assert told["input_tokens"] == 5 + 64
    assert told["total_tokens"] == told["input_tokens"] + told["output_tokens"] == 69 + 3 * 64


def test_an_event_is_two_lines_whatever_is_in_it() -> None:
    style = replace(STYLE, model_id="a\nb\r\u2028")
    events = [partial_event(Partial(1, 2, 3, 8, b"\n\n"), JOB, STYLE), *finished_events(finished(JOB), JOB, style)]
    for event in events:
        name, data, *rest = event.decode().split("\n")
        assert rest == ["", ""]
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert [event.split()[1] for event in events] == [
        b"image_edit.partial_image", b"image_edit.candidate", b"image_edit.completed", b"image_edit.completed",
    ]  # fmt: skip


def test_a_score_that_is_no_number_is_never_sent() -> None:
    done = finished(JOB)
    broken = replace(done, images=(replace(done.images[0], score=float("nan")), *done.images[1:]))
    with pytest.raises(ValueError, match="JSON compliant"):
        answer_body(JOB, broken, STYLE)


def _is_another_answered_meanwhile(
    monkeypatch: pytest.MonkeyPatch, *, in_a_thread_bytes: int, patience_s: float
) -> bool:
    """Whether another request is answered while a large answer is made, which takes until then or `patience_s`."""
    is_begun, is_answered, answered_in_time = threading.Event(), threading.Event(), []

    def make(*_: Any) -> bytes:
        is_begun.set()
        answered_in_time.append(is_answered.wait(patience_s))
        return b"{}"

    async def large(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        yield finished(job, data=b"x" * 100_000)

    monkeypatch.setattr(api_server, "_IN_A_THREAD_BYTES", in_a_thread_bytes)
    monkeypatch.setattr(api_server, "answer_body", make)
    app = build_api(ScriptedPool(large), ServeSettings(page=False))
    with serving(app) as port, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(post_json, port, "/v1/images/generations", {"prompt": "a", "n": 10})
        assert is_begun.wait(60)
        assert ask(port, "GET", "/healthz").status == 200
        is_answered.set()
        assert answer.result().status == 200
    return all(answered_in_time)


def test_large_answers_are_made_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _is_another_answered_meanwhile(monkeypatch, in_a_thread_bytes=256 * 1024, patience_s=60)
    # and on it, they hold everybody up
    assert not _is_another_answered_meanwhile(monkeypatch, in_a_thread_bytes=10**12, patience_s=0.5)
