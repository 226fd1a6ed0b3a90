import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from serve.api import access
from serve.api.application import build_api
from serve.api.errors import Failure
from serve.api.keys import make_key
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, exchange, request_bytes, serving, wait_until

# Paths with their methods; the page is served at `/` and /page/.
OPEN = [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/")]
CLOSED = [
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/tokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/metrics"),
    ("GET", "/nothing/here"),
    ("DELETE", "/v1/models"),
    ("OPTIONS", "/v1/images/generations"),
    ("GET", "/page"),
    ("GET", "//healthz"),
    ("GET", "/metrics/"),
    ("GET", "/v1/models/"),
    ("GET", "/v1/models/../../healthz"),
]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A keys file and the keys in it."""
    made = {
        "shop": make_key("shop", scopes=["generate"], per_minute=60),
        "watch": make_key("watch", scopes=["metrics"]),
        "old": make_key("old", scopes=["generate", "metrics"], expires=datetime(2020, 1, 1, tzinfo=UTC)),
    }
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    entries = [entry.model_dump(mode="json", by_alias=True, exclude_none=True) for _, entry in made.values()]
    path.write_text(yaml.safe_dump({"keys": entries}), encoding="utf-8")
    return path, {name: plain for name, (plain, _) in made.items()}


@pytest.fixture(scope="module")
def guarded(keys: tuple[Path, dict[str, str]]) -> Iterator[tuple[int, ScriptedPool]]:
    pool = ScriptedPool()
    with serving(build_api(pool, ServeSettings(keys_file=str(keys[0])))) as port:
        yield port, pool


def _status(port: int, method: str, path: str, **headers: str) -> tuple[int, str]:
    reply = ask(port, method, path, headers=headers)
    return reply.status, reply.error["code"] if reply.status >= 400 else ""


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_path_but_the_open_ones_needs_a_key_with_the_scope(
    guarded: tuple[int, ScriptedPool], keys: tuple[Path, dict[str, str]], method: str, path: str
) -> None:
    port, plain = guarded[0], keys[1]
    assert _status(port, method, path) == (401, "missing_api_key")
    for wrong in (
        "Bearer nonsense",
        f"Bearer {plain['shop'][:-1]}",
        f"Basic {plain['shop']}",
        plain["shop"],
        "Bearer",
        f"Bearer {plain['shop']} {plain['shop']}",
        f"Bearer {plain['old']}",
        "Bearer \xff",
        "Bearer " + "a" * 9000,
    ):
        assert _status(port, method, path, authorization=wrong) == (401, "invalid_api_key"), wrong
    wrong_scope, right = ("shop", "watch") if path.startswith("/metrics") else ("watch", "shop")
    assert _status(port, method, path, authorization=f"Bearer {plain[wrong_scope]}") == (403, "insufficient_scope")
    status, code = _status(port, method, path, authorization=f"bearer {plain[right]}")
    assert status not in (401, 403), code


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_health_and_the_page_are_open(guarded: tuple[int, ScriptedPool], method: str, path: str) -> None:
    assert _status(guarded[0], method, path, host="kodalle.example")[0] == 200


def test_without_the_check_the_same_paths_are_open(monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    monkeypatch.setattr(access, "_holder", lambda *_: access.LOCAL)
    with serving(build_api(ScriptedPool(), ServeSettings(keys_file=str(keys[0]), page=False))) as port:
        assert {_status(port, method, path)[0] for method, path in CLOSED[3:8]} == {200}


def test_two_authorization_headers_are_rejected(guarded: tuple[int, ScriptedPool], keys: Any) -> None:
    header = f"authorization: Bearer {keys[1]['shop']}\r\n".encode()
    request = request_bytes("GET", "/v1/models", port=guarded[0])
    twice = request.replace(b"connection", header + header + b"connection")
    assert exchange(guarded[0], twice).error["code"] == "invalid_api_key"
    assert exchange(guarded[0], request.replace(b"connection", header + b"connection")).status == 200


def test_a_rejected_request_is_logged_without_a_key_id(
    guarded: tuple[int, ScriptedPool], caplog: pytest.LogCaptureFixture
) -> None:
    request = request_bytes("GET", "/v1/models", port=guarded[0])
    wrong = request.replace(b"connection", b"authorization: Bearer wrong\r\nconnection")
    with caplog.at_level(logging.INFO, logger="serve.requests"):
        assert exchange(guarded[0], wrong).status == 401
        wait_until(lambda: len(caplog.records) == 1)  # written after the last byte
    line = json.loads(caplog.records[0].message)
    assert (line["status"], line["code"], line["key_id"]) == (401, "invalid_api_key", None)
    assert line["route"] == "/v1/models"


def test_a_rejected_request_is_logged_with_its_route(
    guarded: tuple[int, ScriptedPool], caplog: pytest.LogCaptureFixture
) -> None:
    requests = [
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models/secret"),
        ("GET", "/secret"),
        ("GET", "/metrics"),
    ]
    with caplog.at_level(logging.INFO, logger="serve.requests"):
        for method, path in requests:
            assert _status(guarded[0], method, path)[0] == 401
        wait_until(lambda: len(caplog.records) == len(requests))
    routes = [json.loads(record.message)["route"] for record in caplog.records]
    assert routes == ["/v1/images/generations", "/v1/models/{model_id:path}", "other", "/metrics"]
    assert "secret" not in caplog.text


def test_openais_client_sends_the_key_and_raises_its_own_errors(
    guarded: tuple[int, ScriptedPool], keys: tuple[Path, dict[str, str]]
) -> None:
    port, pool = guarded
    url = f"http://127.0.0.1:{port}/v1"
    answer = openai.OpenAI(base_url=url, api_key=keys[1]["shop"]).images.generate(prompt="a")
    assert answer.data is not None
    assert pool.jobs[-1].key_id == "shop"
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(base_url=url, api_key="wrong").images.generate(prompt="a")
    assert raised.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        openai.OpenAI(base_url=url, api_key=keys[1]["watch"]).images.generate(prompt="a")


def test_a_keys_rate_limit_counts_candidates_and_gives_retry_after(
    guarded: tuple[int, ScriptedPool], keys: tuple[Path, dict[str, str]]
) -> None:
    port, pool = guarded
    headers = {"authorization": f"Bearer {keys[1]['shop']}"}
    pool.wait_s = 7.2
    try:
        body = {"prompt": "a", "n": 2, "candidates": 9}
        reply = ask(port, "POST", "/v1/images/generations", json_body=body, headers=headers)
    finally:
        pool.wait_s = 0.0
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "rate_limit_exceeded", "8")
    assert pool.taken[-1] == ("shop", 60.0, 9)


# ------------------------------------------------------------------------------------------------------- without keys


@pytest.fixture(scope="module")
def local() -> Iterator[int]:
    with serving(build_api(ScriptedPool(), ServeSettings(page=False))) as port:
        yield port


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.8.9.1:80", "[::1]:8000", "app.localhost:1", "LOCALHOST"]
)
def test_without_keys_requests_from_this_machine_are_answered(local: int, host: str) -> None:
    assert _status(local, "GET", "/v1/models", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "192.168.0.7", "0.0.0.0", "[::2]", "[", "127.0.0.1@evil.example", ""],
)
def test_without_keys_a_name_rebound_to_this_machine_is_rejected(local: int, host: str) -> None:
    expected = (403, "not_local")
    assert _status(local, "GET", "/v1/models", host=host) == expected
    assert _status(local, "GET", "/healthz", host=host)[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        "X-Forwarded-For", "Forwarded", "X-Real-IP", "x-forwarded-host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded", "Via",
        "CF-Connecting-IP", "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "X-Original-Forwarded-For", "X-Envoy-External-Address",
    ],
)  # fmt: skip
def test_without_keys_what_a_proxy_passed_on_is_rejected(local: int, name: str) -> None:
    reply = ask(local, "GET", "/v1/models", headers={name: "192.0.2.7"})
    assert (reply.status, reply.error["code"]) == (403, "not_local")
    assert "keys" in reply.error["message"]
    assert ask(local, "GET", "/healthz", headers={name: "192.0.2.7"}).status == 200


def test_with_keys_a_proxy_may_pass_requests_on(guarded: tuple[int, ScriptedPool], keys: Any) -> None:
    headers = {"authorization": f"Bearer {keys[1]['shop']}", "x-forwarded-for": "192.0.2.7", "host": "kodalle.example"}
    assert ask(guarded[0], "GET", "/v1/models", headers=headers).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1"])
def test_without_keys_another_sites_page_is_rejected(local: int, origin: str) -> None:
    assert _status(local, "POST", "/v1/images/edits", origin=origin) == (403, "cross_site")


def test_without_keys_the_servers_own_page_is_answered(local: int) -> None:
    body = {"prompt": "a"}
    headers = {"origin": f"http://127.0.0.1:{local}"}
    assert ask(local, "POST", "/v1/images/generations", json_body=body, headers=headers).status == 200


def test_without_the_local_check_another_sites_page_would_be_answered(
    local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_check_local", lambda *_: None)
    headers = {"origin": "http://evil.example", "host": "evil.example"}
    assert ask(local, "POST", "/v1/images/generations", json_body={"prompt": "a"}, headers=headers).status == 200


@pytest.mark.parametrize(
    "server", [None, ("192.168.0.7", 8000), ("0.0.0.0", 8000), ("fe80::1", 1), ("/run/socket", None)]
)
def test_without_keys_a_connection_from_another_machine_is_rejected(server: Any) -> None:
    scope = {"type": "http", "server": server, "headers": [(b"host", b"localhost")]}
    with pytest.raises(Failure) as raised:
        access.admit(scope, "/v1/models", None)
    assert raised.value.code == "not_local"
    assert access.admit(scope | {"server": ("::1", 80)}, "/v1/models", None) is access.LOCAL


def test_a_root_path_opens_nothing(keys: tuple[Path, dict[str, str]]) -> None:
    settings = ServeSettings(keys_file=str(keys[0]), root_path="/kodalle")
    with serving(build_api(ScriptedPool(), settings)) as port:
        for path in (
            "/kodalle/v1/models",
            "/v1/models",
            "/kodalle/metrics",
            "/kodalle/kodalle/healthz",
            "/healthz/kodalle",
        ):
            assert _status(port, "GET", path) == (401, "missing_api_key")
        assert _status(port, "GET", "/kodalle/healthz")[0] == 200
