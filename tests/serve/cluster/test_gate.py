"""The layer in front of Ray's proxy: what it takes off, what it ends, what it sends again."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.serve._private.http_util import parse_disconnect_disabled_header, parse_request_timeout_header
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.cluster.gate import MAX_BODY_VARIABLE, Gate, middlewares

OURS = [(b"content-security-policy", b"default-src 'none'"), (b"content-type", b"application/json")]
Headers = list[tuple[bytes, bytes]]
Inner = Callable[[Scope, Receive, Send], Awaitable[None]]


def through(
    app: ASGIApp,
    *,
    path: str = "/v1/models",
    headers: Headers | None = None,
    body: tuple[bytes, ...] = (b"",),
    max_body_bytes: int = 100,
) -> list[Message]:
    """What a client gets; it hangs up after its last chunk when that is None."""
    sent: list[Message] = []
    chunks: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": number < len(body) - 1}
        for number, chunk in enumerate(body)
    ]

    async def receive() -> Message:
        if chunks:
            return chunks.pop(0)
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": headers or []}
    asyncio.run(Gate(app, max_body_bytes=max_body_bytes)(scope, receive, send))  # type: ignore[arg-type]
    return sent


def status_and_body(sent: list[Message]) -> tuple[int, Any]:
    assert [message["type"] for message in sent].count("http.response.start") == 1
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body) if body[:1] == b"{" else body


async def whole_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        body += message["body"]
        if not message["more_body"]:
            return body


def replying(status: int = 200, headers: Headers = OURS, *, seen: list[Any] | None = None) -> Inner:
    """An edge, or with other headers Ray's proxy itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if seen is not None:
            seen.append((scope, await whole_body(receive)))
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b'{"a": 1}'})

    return app


# ------------------------------------------------------------------------------------------------------------- headers

STEERING = [
    (b"x-request-timeout-seconds", b"0"),
    (b"X-Request-Disconnect-Disabled", b"?1"),
    (b"serve_multiplexed_model_id", b"m"),
    (b"serve-multiplexed-model-id", b"m"),
    (b"x-session-id", b"s"),
]


def test_headers_that_steer_ray_do_not_reach_it_and_others_do() -> None:
    seen: list[Any] = []
    through(replying(seen=seen), headers=[*STEERING, (b"accept", b"*/*"), (b"x-stainless-retry-count", b"1")])
    assert seen[0][0]["headers"] == [(b"accept", b"*/*"), (b"x-stainless-retry-count", b"1")]


def test_without_the_gate_ray_obeys_them() -> None:
    given = dict(STEERING[:1]) | {b"x-request-disconnect-disabled": b"?1"}
    assert parse_request_timeout_header(given, 30.0) is None, "the server's timeout is off"
    assert parse_disconnect_disabled_header(given)
    seen: list[Any] = []
    through(replying(seen=seen), headers=list(given.items()))
    left = dict(seen[0][0]["headers"])
    assert parse_request_timeout_header(left, 30.0) == 30.0
    assert not parse_disconnect_disabled_header(left)


@pytest.mark.parametrize("given", [b"a b", b"x" * 65, b"\xff", b"a\tb", b""])
def test_a_request_id_that_does_not_belong_into_a_log_is_taken_off(given: bytes) -> None:
    seen: list[Any] = []
    through(replying(seen=seen), headers=[(b"x-request-id", given)])
    assert seen[0][0]["headers"] == []
    through(replying(seen=seen), headers=[(b"x-request-id", b"my-id.7")])
    assert seen[1][0]["headers"] == [(b"x-request-id", b"my-id.7")]


def test_a_reply_has_one_request_id_which_is_the_edges() -> None:
    twice = [*OURS, (b"x-request-id", b"edge"), (b"X-Request-ID", b"ray")]
    sent = through(replying(headers=twice))
    assert [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"] == [b"edge"]


# -------------------------------------------------------------------------------------------------------------- bodies


def test_a_body_declared_too_large_is_refused_unread() -> None:
    seen: list[Any] = []
    status, body = status_and_body(through(replying(seen=seen), headers=[(b"content-length", b"101")]))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert not seen
    assert status_and_body(through(replying(seen=seen), headers=[(b"content-length", b"100")]))[0] == 200


def test_a_body_that_grows_too_large_ends_for_ray_as_a_hang_up_and_for_the_client_as_413() -> None:
    read: list[int] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request":
            read.append(len(message["body"]))

    status, body = status_and_body(through(proxy, body=(b"x" * 60, b"x" * 60, b"x" * 60)))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert read == [60], "nothing beyond the limit is passed on"


def test_a_body_within_the_limit_arrives_as_it_is() -> None:
    seen: list[Any] = []
    assert status_and_body(through(replying(seen=seen), body=(b"a" * 50, b"b" * 50)))[0] == 200
    assert seen[0][1] == b"a" * 50 + b"b" * 50


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_BODY_VARIABLE, "12")
    (middleware,) = middlewares()
    gate: Any = middleware.cls(replying(), **middleware.kwargs)
    assert gate._max_body_bytes == 12


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rays", "status", "code"),
    [
        (404, 503, "unavailable"),
        (503, 503, "unavailable"),
        (429, 429, "queue_full"),
        (408, 504, "deadline_exceeded"),
    ],
)
def test_rays_own_errors_get_the_shape_of_all_others(rays: int, status: int, code: str) -> None:
    told, body = status_and_body(through(replying(rays, [(b"content-type", b"text/plain")])))
    assert (told, body["error"]["code"]) == (status, code)
    assert body["error"].keys() == {"message", "message_ko", "type", "param", "code"}


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500, 503])
def test_an_edges_replies_pass_unchanged(status: int) -> None:
    assert status_and_body(through(replying(status))) == (status, {"a": 1})


def test_what_is_deployed_is_nobodys_business_and_probes_still_work() -> None:
    assert status_and_body(through(replying(), path="/-/routes"))[0] == 404
    assert status_and_body(through(replying(), path="/-/healthz"))[0] == 200


# ------------------------------------------------------------------------------------------------------ edges that die


def dying(times: int, *, seen: list[Any], with_reply: bool = False) -> Inner:
    """Ray's proxy, whose edge dies `times` times: it says nothing at all, or, with_reply, in the middle of an answer."""
    api_server = replying(seen=seen)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if len(seen) < times:
            seen.append((scope, await whole_body(receive)))
            if with_reply:
                await send({"type": "http.response.start", "status": 200, "headers": OURS})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
            return
        await api_server(scope, receive, send)

    return app


def test_a_request_whose_edge_died_is_sent_once_more_with_its_whole_body() -> None:
    seen: list[Any] = []
    sent = through(dying(1, seen=seen), body=(b"one ", b"two"))
    assert status_and_body(sent) == (200, {"a": 1})
    assert [body for _, body in seen] == [b"one two", b"one two"]


def test_a_request_that_kills_two_edges_is_given_up() -> None:
    seen: list[Any] = []
    status, body = status_and_body(through(dying(9, seen=seen), body=(b"one",)))
    assert (status, body["error"]["code"]) == (500, "drawing_failed")
    assert len(seen) == 2


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    seen: list[Any] = []
    sent = through(dying(1, seen=seen, with_reply=True), body=(b"one",))
    assert [message.get("body") for message in sent[1:]] == [b"half"], "the server closes the connection"
    assert len(seen) == 1


def test_a_client_that_hung_up_is_not_drawn_for_again() -> None:
    calls: list[int] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> None:
        messages: list[Message] = [
            {"type": "http.request", "body": b"", "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            raise AssertionError(message)

        scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await Gate(proxy, max_body_bytes=10)(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert calls == [1]
