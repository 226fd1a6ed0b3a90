"""The middleware in front of Ray's proxy: removed headers, limits, errors, re-sent requests."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.serve._private.http_util import parse_disconnect_disabled_header, parse_request_timeout_header
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.cluster.gate import MAX_BODY_VARIABLE, ORIGINS_VARIABLE, Gate, middlewares

API_SERVER_HEADERS = [(b"content-security-policy", b"default-src 'none'"), (b"content-type", b"application/json")]
Headers = list[tuple[bytes, bytes]]
Inner = Callable[[Scope, Receive, Send], Awaitable[None]]


def through(
    app: ASGIApp,
    *,
    path: str = "/v1/models",
    headers: Headers | None = None,
    body: tuple[bytes, ...] = (b"",),
    max_body_bytes: int = 100,
    origins: tuple[str, ...] = (),
) -> list[Message]:
    """The messages that a client receives."""
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
    asyncio.run(Gate(app, max_body_bytes=max_body_bytes, origins=origins)(scope, receive, send))
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


def replying(status: int = 200, headers: Headers = API_SERVER_HEADERS, *, seen: list[Any] | None = None) -> Inner:
    """An API server, or with other headers Ray's proxy itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if seen is not None:
            seen.append((scope, await whole_body(receive)))
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b'{"a": 1}'})

    return app


# ------------------------------------------------------------------------------------------------------------- headers

CONTROL_HEADERS = [
    (b"x-request-timeout-seconds", b"0"),
    (b"X-Request-Disconnect-Disabled", b"?1"),
    (b"serve_multiplexed_model_id", b"m"),
    (b"serve-multiplexed-model-id", b"m"),
    (b"x-session-id", b"s"),
]


def test_only_control_headers_are_removed() -> None:
    seen: list[Any] = []
    through(replying(seen=seen), headers=[*CONTROL_HEADERS, (b"accept", b"*/*"), (b"x-stainless-retry-count", b"1")])
    assert seen[0][0]["headers"] == [(b"accept", b"*/*"), (b"x-stainless-retry-count", b"1")]


def test_without_the_gate_ray_obeys_control_headers() -> None:
    sent = dict(CONTROL_HEADERS[:1]) | {b"x-request-disconnect-disabled": b"?1"}
    assert parse_request_timeout_header(sent, 30.0) is None, "the server's timeout is off"
    assert parse_disconnect_disabled_header(sent)
    seen: list[Any] = []
    through(replying(seen=seen), headers=list(sent.items()))
    left = dict(seen[0][0]["headers"])
    assert parse_request_timeout_header(left, 30.0) == 30.0
    assert not parse_disconnect_disabled_header(left)


@pytest.mark.parametrize("request_id", [b"a b", b"x" * 65, b"\xff", b"a\tb", b""])
def test_a_request_id_that_is_unfit_for_a_log_is_removed(request_id: bytes) -> None:
    seen: list[Any] = []
    through(replying(seen=seen), headers=[(b"x-request-id", request_id)])
    assert seen[0][0]["headers"] == []
    through(replying(seen=seen), headers=[(b"x-request-id", b"my-id.7")])
    assert seen[1][0]["headers"] == [(b"x-request-id", b"my-id.7")]


def test_a_reply_has_only_the_api_servers_request_id() -> None:
    twice = [*API_SERVER_HEADERS, (b"x-request-id", b"api-server"), (b"X-Request-ID", b"ray")]
    sent = through(replying(headers=twice))
    assert [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"] == [b"api-server"]


# -------------------------------------------------------------------------------------------------------------- bodies


def test_a_body_declared_too_large_is_rejected_unread() -> None:
    seen: list[Any] = []
    status, body = status_and_body(through(replying(seen=seen), headers=[(b"content-length", b"101")]))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert not seen
    assert status_and_body(through(replying(seen=seen), headers=[(b"content-length", b"100")]))[0] == 200


def test_a_body_that_grows_too_large_is_a_disconnect_for_ray_and_413_for_the_client() -> None:
    read: list[int] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request":
            read.append(len(message["body"]))

    status, body = status_and_body(through(proxy, body=(b"x" * 60, b"x" * 60, b"x" * 60)))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert read == [60], "no byte beyond the limit is forwarded"


def test_a_body_within_the_limit_arrives_unchanged() -> None:
    seen: list[Any] = []
    assert status_and_body(through(replying(seen=seen), body=(b"a" * 50, b"b" * 50)))[0] == 200
    assert seen[0][1] == b"a" * 50 + b"b" * 50


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_BODY_VARIABLE, "12")
    (middleware,) = middlewares()
    make_gate: Any = middleware.cls
    gate = make_gate(replying(), **middleware.kwargs)
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
def test_rays_own_errors_become_the_error_object(rays: int, status: int, code: str) -> None:
    found, body = status_and_body(through(replying(rays, [(b"content-type", b"text/plain")])))
    assert (found, body["error"]["code"]) == (status, code)
    assert body["error"].keys() == {"message", "message_ko", "type", "param", "code"}


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500, 503])
def test_an_api_servers_replies_pass_unchanged(status: int) -> None:
    assert status_and_body(through(replying(status))) == (status, {"a": 1})


def test_rays_list_of_deployments_is_404_and_probes_still_work() -> None:
    assert status_and_body(through(replying(), path="/-/routes"))[0] == 404
    assert status_and_body(through(replying(), path="/-/healthz"))[0] == 200


# ------------------------------------------------------------------------------------------------- dying API servers


def dying(times: int, *, seen: list[Any], with_reply: bool = False) -> Inner:
    """Ray's proxy with an API server that dies `times` times: without a reply, or, with_reply, in the middle of one."""
    api_server = replying(seen=seen)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if len(seen) < times:
            seen.append((scope, await whole_body(receive)))
            if with_reply:
                await send({"type": "http.response.start", "status": 200, "headers": API_SERVER_HEADERS})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
            return
        await api_server(scope, receive, send)

    return app


def test_a_request_whose_api_server_died_is_sent_once_more_with_its_whole_body() -> None:
    seen: list[Any] = []
    sent = through(dying(1, seen=seen), body=(b"one ", b"two"))
    assert status_and_body(sent) == (200, {"a": 1})
    assert [body for _, body in seen] == [b"one two", b"one two"]


def test_a_request_that_kills_two_api_servers_is_given_up() -> None:
    seen: list[Any] = []
    status, body = status_and_body(through(dying(9, seen=seen), body=(b"one",)))
    assert (status, body["error"]["code"]) == (500, "generation_failed")
    assert len(seen) == 2


def test_a_reply_that_has_started_is_not_started_again() -> None:
    seen: list[Any] = []
    sent = through(dying(1, seen=seen, with_reply=True), body=(b"one",))
    assert [message.get("body") for message in sent[1:]] == [b"half"], "the server closes the connection"
    assert len(seen) == 1


def test_a_disconnected_clients_request_is_not_sent_again() -> None:
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
        await Gate(proxy, max_body_bytes=10)(scope, receive, send)

    asyncio.run(run())
    assert calls == [1]


@pytest.mark.parametrize(("origin", "is_listed"), [(b"https://studio.example", True), (b"https://evil.example", False)])
def test_its_own_errors_can_be_read_by_a_listed_browser_app(
    monkeypatch: pytest.MonkeyPatch, origin: bytes, is_listed: bool
) -> None:
    async def overloaded(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})
        await send({"type": "http.response.body", "body": b"Request dropped"})

    monkeypatch.setenv(ORIGINS_VARIABLE, "http://localhost:3000 https://studio.example")
    origins: Any = middlewares()[0].kwargs["origins"]
    sent = through(overloaded, headers=[(b"origin", origin)], origins=origins)
    assert status_and_body(sent)[1]["error"]["code"] == "queue_full"
    assert ((b"access-control-allow-origin", origin) in sent[0]["headers"]) is is_listed


# ------------------------------------------------------------------------------------------------------- slow clients


def slow_reply(parts: int, *, is_read_after: int | None) -> list[str]:
    """What happens, in order, when an app sends parts of 32 KiB to a client that reads nothing before.

    Args:
        is_read_after: parts that the app has sent; None: the app is done.
    """
    events: list[str] = []

    async def run() -> None:
        reads = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": list(API_SERVER_HEADERS)})
            for number in range(parts):
                if number == is_read_after:
                    asyncio.get_running_loop().call_later(0.05, reads.set)
                await send({"type": "http.response.body", "body": bytes(2**15), "more_body": number < parts - 1})
                events.append("sent")
            events.append("done")
            reads.set()

        async def send(message: Message) -> None:
            await reads.wait()
            events.append("read" if message["type"] == "http.response.body" else "start")

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope: Scope = {"type": "http", "method": "GET", "path": "/page/main.js", "headers": []}
        await asyncio.wait_for(Gate(app, max_body_bytes=100)(scope, receive, send), 20)

    asyncio.run(run())
    return events


def test_ray_is_done_with_a_small_reply_before_its_client_is() -> None:
    assert slow_reply(2, is_read_after=None) == ["sent", "sent", "done", "start", "read", "read"]


def test_a_large_reply_waits_for_its_client() -> None:
    events = slow_reply(8, is_read_after=2)
    assert events.index("start") == 2, "64 KiB ahead of it at most"
    assert (events.count("sent"), events.count("read")) == (8, 8)


def test_a_client_that_fails_ends_its_reply() -> None:
    async def send(message: Message) -> None:
        raise ConnectionResetError

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(API_SERVER_HEADERS)})
        for _ in range(20):
            await send({"type": "http.response.body", "body": bytes(2**15), "more_body": True})
            await asyncio.sleep(0)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(ConnectionResetError):
        asyncio.run(asyncio.wait_for(Gate(app, max_body_bytes=100)(scope, receive, send), 20))
