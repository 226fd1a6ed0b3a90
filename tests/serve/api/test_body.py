import asyncio
import json
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.datastructures import Headers

from serve.api import body
from serve.api.application import build_api
from serve.api.body import body_chunks, content_type, parse_object
from serve.api.errors import Failure
from serve.settings import Limits, ServeSettings
from tests.live_server import ScriptedPool, ask, exchange, read_reply, request_bytes, serving

BAD_BODIES = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b'"text"', "invalid_json"),
    (b"[1]", "invalid_json"),
    (b'{"prompt": NaN}', "invalid_json"),
    (b'{"prompt": -Infinity}', "invalid_json"),
    (b'{"n": 1e400}', "invalid_json"),
    (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
    (b'{"n": 0.' + b"1" * 5000 + b"}", "invalid_json"),
    (b'{"prompt": "a", "prompt": "b"}', "invalid_json"),
    (b'{"svg": {"a": 1, "a": 2}}', "invalid_json"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    (b'{"a": [[[[1]]]]}', "invalid_json"),
    (b'{"a": [[[{}]]]}', "invalid_json"),
    (b'{"prompt": "\xff"}', "invalid_json"),
    (b"\xef\xbb\xbf{}", "invalid_json"),
    ('{"prompt": "a"}'.encode("utf-16"), "invalid_json"),
    (b'{"prompt": "\\ud800"}', "invalid_value"),
    (b'{"\\udfff": 1}', "invalid_value"),
    (b'{"prompt": "a\\u0000b"}', "invalid_value"),
    (b'{"svg": {"model": "\\u0000"}}', "invalid_value"),
    (b'{"a": [["\\u0000"]]}', "invalid_value"),
]


def test_a_valid_body_equals_what_json_parses() -> None:
    value = {
        "prompt": "빨강 니트 \U0001f457",
        "n": 2,
        "seed": 2**64 - 1,
        "top_p": 0.5,
        "stream": True,
        "svg": {"a": [1]},
    }
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2)):
        assert parse_object(text.encode()) == value


def test_an_integer_may_have_a_decimal_point_or_an_exponent() -> None:
    value = parse_object(b'{"n": 2.0, "seed": 1e3, "top_p": 0.5, "temperature": 1e300, "guidance": -0.0}')
    assert [(type(one), one) for one in value.values()] == [
        (int, 2), (int, 1000), (float, 0.5), (float, 1e300), (int, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("sent", "code"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_unsafe_bodies_are_rejected(sent: bytes, code: str) -> None:
    with pytest.raises(Failure) as raised:
        parse_object(sent)
    assert raised.value.code == code
    raised.value.body().decode("utf-8")


def test_without_the_checks_the_same_bodies_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_DEPTH", 10)
    monkeypatch.setattr(body, "MAX_NUMBER_CHARACTERS", 6000)
    monkeypatch.setattr(body, "_no_constant", float)
    monkeypatch.setattr(body, "_finite_number", float)
    monkeypatch.setattr(body, "_unique_keys", dict)
    monkeypatch.setattr(body, "check_text", lambda _: None)
    passed = []
    for sent, _ in BAD_BODIES:
        try:
            parse_object(sent)
        except (Failure, ValueError):  # an integer of more than 4,300 digits is Python's own error
            continue
        passed.append(sent)
    assert len(passed) == 13


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_types_and_compressed_bodies_are_415(headers: dict[str, str]) -> None:
    with pytest.raises(Failure) as raised:
        content_type(Headers(headers), "application/json")
    assert raised.value.status == 415


def test_two_content_types_are_415_and_case_does_not_matter() -> None:
    twice = Headers(raw=[(b"content-type", b"application/json"), (b"content-type", b"application/json")])
    with pytest.raises(Failure):
        content_type(twice, "application/json")
    good = Headers({"content-type": 'Application/JSON; Charset="UTF-8"'})
    assert content_type(good, "application/json") == ("application/json", {"charset": "UTF-8"})


def _read(messages: list[dict[str, Any]], headers: dict[str, str], **limits: Any) -> tuple[bytes, int]:
    """The body, and the number of messages received for it."""
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        return messages[received - 1]

    async def run() -> bytes:
        chunks = body_chunks(receive, Headers(headers), **({"max_bytes": 10, "timeout_s": 1.0} | limits))
        return b"".join([chunk async for chunk in chunks])

    try:
        return asyncio.run(run()), received
    except Failure as failure:
        failure.received = received  # type: ignore[attr-defined]
        raise


def _parts(*bodies: bytes) -> list[dict[str, Any]]:
    last = len(bodies) - 1
    return [
        {"type": "http.request", "body": part, "more_body": number < last} for number, part in enumerate(bodies)
    ]  # fmt: skip


def test_a_body_of_exactly_the_limit_is_read() -> None:
    assert _read(_parts(b"12345", b"67890"), {"content-length": "10"}) == (b"1234567890", 2)


def test_a_declared_length_above_the_limit_is_rejected_before_a_byte_is_read() -> None:
    for declared in ("11", "99999999999999999999999", "-1", "0x5"):
        with pytest.raises(Failure) as raised:
            _read(_parts(b"1"), {"content-length": declared})
        assert raised.value.status == 413
        assert raised.value.received == 0  # type: ignore[attr-defined]


def test_received_bytes_above_the_limit_are_rejected_whatever_was_declared() -> None:
    for headers in ({}, {"content-length": "5"}, {"transfer-encoding": "chunked"}):
        with pytest.raises(Failure) as raised:
            _read(_parts(b"12345", b"67890", b"!", b"never read"), headers)
        assert raised.value.status == 413
        assert raised.value.received == 3  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------- on a real socket


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    limits = Limits(max_json_bytes=2000, max_edit_bytes=4000, body_timeout_s=0.5)
    with serving(build_api(ScriptedPool(), ServeSettings(limits=limits, page=False))) as port:
        yield port


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/tokenize"])
def test_a_large_body_is_413_whether_declared_or_chunked(port: int, path: str) -> None:
    large = b'{"prompt": "' + b"a" * 3000 + b'"}'
    assert ask(port, "POST", path, body=large).status == 413
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (large[:1500], large[1500:])) + b"0\r\n\r\n"
    head = request_bytes(
        "POST", path, port=port, headers={"content-length": "", "transfer-encoding": "chunked"}
    )  # fmt: skip
    reply = exchange(port, head + chunked)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


@pytest.mark.slow
def test_an_incomplete_body_is_408_and_must_not_be_retried(port: int) -> None:
    whole = request_bytes("POST", "/v1/images/generations", body=b'{"prompt": "a"}', port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(whole[:-5])
        reply = read_reply(connection)
    assert (reply.status, reply.error["code"], reply.headers["x-should-retry"]) == (408, "request_timeout", "false")


def test_a_client_that_trickles_bytes_gains_no_time(port: int) -> None:
    """Five bytes per timeout: if each byte restarted it, the whole body would arrive."""
    whole = request_bytes("POST", "/v1/images/generations", body=b'{"prompt": "a"}' + b" " * 50, port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(whole[:-50])
        for byte in whole[-50:]:
            is_answered, _, _ = select.select([connection], [], [], 0.1)
            if is_answered:
                break
            connection.sendall(bytes([byte]))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_disconnects_while_sending_is_counted_as_499(port: int) -> None:
    whole = request_bytes("POST", "/v1/images/generations", body=b'{"prompt": "a"}', port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(whole[:-5])
    assert ask(port, "GET", "/healthz").status == 200
    metrics = ask(port, "GET", "/metrics").body.decode()
    assert 'route="/v1/images/generations",status="499"' in metrics
