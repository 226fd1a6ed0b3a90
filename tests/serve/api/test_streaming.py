import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from serve.api import streaming
from serve.api.application import build_api
from serve.messages import GenerationEvent, GenerationJob, Partial, Progress, Queued, Refused
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, finished, post_json, request_bytes, serving, wait_until

GENERATE = "/v1/images/generations"


async def all_events(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    """All types of events, as of a job that had to wait."""
    if job.wants_progress:
        yield Queued(2, 1.5)
        yield Progress(10, 64)
    for number in range(job.num_images):
        for index in range(job.num_partials):
            yield Partial(number, index, index + 1, 8, b"half an image")
    yield finished(job)


async def never(_: GenerationJob) -> AsyncIterator[GenerationEvent]:
    await asyncio.sleep(3600)
    yield Progress(0, 1)


async def progress_forever(_: GenerationJob) -> AsyncIterator[GenerationEvent]:
    while True:
        await asyncio.sleep(0.01)
        yield Progress(1, 64)


async def ends_early(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    if job.wants_progress:
        yield Progress(1, 64)


async def breaks(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
    if job.wants_progress:
        yield Progress(1, 64)
    raise ZeroDivisionError("빨강 is in no log")


def refuses(
    refused: Refused, *, after_progress: bool = False
) -> Callable[[GenerationJob], AsyncIterator[GenerationEvent]]:
    async def script(_: GenerationJob) -> AsyncIterator[GenerationEvent]:
        if after_progress:
            yield Progress(1, 64)
        yield refused

    return script


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each one's name must be its type."""
    events = []
    for block in body.decode().split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def test_a_stream_has_all_events_in_order() -> None:
    with serving(build_api(ScriptedPool(all_events), ServeSettings(page=False))) as port:
        body = {"prompt": "a", "n": 2, "candidates": 3, "stream": True, "partial_images": 2, "progress": True}
        reply = post_json(port, GENERATE, body | {"all_candidates": True, "seed": 9})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-store", "no")
    events = events_of(reply.body)
    names = [event["type"].removeprefix("image_generation.") for event in events]
    assert names == ["queued", "progress", *["partial_image"] * 4, "candidate", "completed", "completed"]
    assert events[0] == {"type": "image_generation.queued", "position": 2, "wait_s": 1.5}
    partial, best, second = events[2], events[-2], events[-1]
    assert (partial["image_index"], partial["partial_image_index"], partial["rows_generated"], partial["rows_total"]) == (
        0, 0, 1, 8,
    )  # fmt: skip
    assert [best["image_index"], second["image_index"], events[6]["image_index"]] == [0, 1, 2]
    assert [best["rank"], second["rank"], events[6]["rank"]] == [1, 2, 3]
    for event in events[2:]:
        assert {"b64_json", "created_at", "size", "quality", "background", "output_format"} <= event.keys()
        assert event["seed"] == 9
    assert best["usage"] == second["usage"]
    assert best["usage"]["total_tokens"] == 5 + 3 * 64
    assert best["request_id"] == reply.headers["x-request-id"]


def test_openais_client_reads_the_stream() -> None:
    with serving(build_api(ScriptedPool(all_events), ServeSettings(page=False))) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        stream = client.images.generate(prompt="a", n=2, stream=True, partial_images=1, extra_body={"seed": 3})
        events = list(stream)
    assert [type(event).__name__ for event in events] == ["ImageGenPartialImageEvent"] * 2 + [
        "ImageGenCompletedEvent"
    ] * 2
    assert [event.image_index for event in events] == [0, 1, 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (Refused("queue_full", retry_after_s=3), 429),
        (Refused("draining", retry_after_s=1), 503),
        (Refused("deadline"), 504),
        (Refused("invalid", "no", param="n"), 400),
        (Refused("failed", "out of memory"), 500),
    ],
)
def test_a_job_that_is_refused_at_once_has_its_own_status_streamed_or_not(
    refused: Refused, status: int, stream: bool
) -> None:
    with serving(build_api(ScriptedPool(refuses(refused)), ServeSettings(page=False))) as port:
        reply = post_json(port, GENERATE, {"prompt": "a", "stream": stream})
    assert reply.status == status
    assert reply.error["param"] == refused.param
    assert reply.headers.get("retry-after") == (None if refused.retry_after_s is None else str(refused.retry_after_s))


@pytest.mark.parametrize("script", [refuses(Refused("failed", "no"), after_progress=True), ends_early, breaks])
def test_a_failure_after_the_first_byte_ends_the_stream_with_an_error_event(script: Any) -> None:
    with serving(build_api(ScriptedPool(script), ServeSettings(page=False))) as port:
        reply = post_json(port, GENERATE, {"prompt": "빨강", "stream": True, "progress": True})
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=2)
        with pytest.raises(openai.APIError) as raised:
            list(client.images.generate(prompt="빨강", stream=True, extra_body={"progress": True}))
    assert reply.status == 200
    last = events_of(reply.body)[-1]
    assert last["type"] == "error"
    assert last["error"]["code"] == raised.value.code
    assert last["error"]["code"] == ("internal_error" if script is breaks else "generation_failed")


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_in_the_pool_is_a_500_without_the_caption_in_reply_or_log(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(build_api(ScriptedPool(breaks), ServeSettings(page=False))) as port:
        reply = post_json(port, GENERATE, {"prompt": "노랑", "stream": stream})
    assert (reply.status, reply.error["code"], reply.headers["x-should-retry"]) == (500, "internal_error", "false")
    assert reply.headers["x-request-id"] in caplog.text
    assert "노랑" not in caplog.text


# ---------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.slow
@pytest.mark.parametrize("script", [never, progress_forever])
@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_holds_whatever_the_worker_does_and_the_client_sends(script: Any, stream: bool) -> None:
    pool = ScriptedPool(script)
    settings = ServeSettings(deadline_s=0.4, page=False)
    with serving(build_api(pool, settings)) as port:
        headers = {"x_request_timeout_seconds": "0", "x_request_disconnect_disabled": "?1"}
        reply = post_json(port, GENERATE, {"prompt": "a", "stream": stream}, **headers)
        wait_until(lambda: not pool.num_open)
    assert pool.jobs[0].deadline_s < 0.4 + 1e-6
    if stream and script is progress_forever:
        assert events_of(reply.body)[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert (reply.status, reply.error["code"], reply.headers["x-should-retry"]) == (
            504, "deadline_exceeded", "false",
        )  # fmt: skip


@pytest.mark.slow
def test_openais_client_retries_a_full_queue_and_not_a_missed_deadline() -> None:
    for script, error, times in (
        (never, openai.InternalServerError, 1),
        (refuses(Refused("queue_full", retry_after_s=0.1)), openai.RateLimitError, 2),
    ):
        pool = ScriptedPool(script)
        with serving(build_api(pool, ServeSettings(deadline_s=0.3, page=False))) as port:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=1)
            with pytest.raises(error):
                client.images.generate(prompt="a")
        assert len(pool.jobs) == times


# -------------------------------------------------------------------------------------------------------- disconnects


def _disconnect(port: int, pool: ScriptedPool, *, stream: bool) -> None:
    """Sends a request, closes the connection, and waits until the job has ended."""
    body = json.dumps({"prompt": "a", "stream": stream, "progress": stream}).encode()
    headers = {"x-request-disconnect-disabled": "?1"}
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request_bytes("POST", GENERATE, body=body, port=port, headers=headers))
        wait_until(lambda: pool.num_open == 1)
    wait_until(lambda: not pool.num_open)


@pytest.mark.parametrize("script", [never, progress_forever])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_the_job(script: Any, stream: bool) -> None:
    pool = ScriptedPool(script)
    app = build_api(pool, ServeSettings(page=False))
    with serving(app) as port:
        for _ in range(10):
            _disconnect(port, pool, stream=stream)  # the scripts never end, and the deadline is minutes away
        count = app.state.metrics.registry.get_sample_value
        wait_until(lambda: count("kodalle_requests_in_flight") == 0)
    assert count("kodalle_cancelled_total") == 10


@pytest.mark.slow
def test_without_disconnect_detection_the_job_goes_on_to_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(_: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(streaming, "_disconnected", deaf)
    pool = ScriptedPool(never)
    app = build_api(pool, ServeSettings(deadline_s=0.5, page=False))
    with serving(app) as port:
        _disconnect(port, pool, stream=False)
        count = app.state.metrics.registry.get_sample_value
        wait_until(lambda: count("kodalle_requests_in_flight") == 0)
    assert count("kodalle_cancelled_total") == 0


@pytest.mark.slow
def test_a_client_that_stops_reading_is_disconnected_at_the_deadline() -> None:
    async def flood(_: GenerationJob) -> AsyncIterator[GenerationEvent]:
        for number in range(100_000):
            yield Partial(0, number, 1, 8, b"x" * 50_000)

    pool = ScriptedPool(flood)
    with serving(build_api(pool, ServeSettings(deadline_s=0.5, page=False))) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        body = b'{"prompt": "a", "stream": true, "partial_images": 1}'
        connection.sendall(request_bytes("POST", GENERATE, body=body, port=port))
        wait_until(lambda: len(pool.jobs) == 1)
        wait_until(lambda: not pool.num_open)
        connection.close()


# --------------------------------------------------------------------------------------------------------- keep-alive


def test_a_silent_stream_is_kept_alive_with_comments_and_may_end_in_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def late(_: GenerationJob) -> AsyncIterator[GenerationEvent]:
        await asyncio.sleep(0.5)
        yield Refused("failed", "no")

    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.1)
    with serving(build_api(ScriptedPool(late), ServeSettings(page=False))) as port:
        reply = post_json(port, GENERATE, {"prompt": "a", "stream": True})
    assert reply.status == 200
    assert reply.body.count(b": keep-alive\n\n") >= 1
    assert [event["type"] for event in events_of(reply.body)] == ["error"]


def test_a_stuck_job_delays_no_other_request() -> None:
    async def stuck_or_not(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        if job.caption == "stuck":
            await asyncio.sleep(3600)
        yield finished(job)

    pool = ScriptedPool(stuck_or_not)
    with (
        serving(build_api(pool, ServeSettings(page=False))) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        connection.sendall(request_bytes("POST", GENERATE, body=b'{"prompt": "stuck"}', port=port))
        wait_until(lambda: pool.num_open == 1)
        for _ in range(20):
            assert post_json(port, GENERATE, {"prompt": "a"}).status == 200
        assert pool.num_open == 1
