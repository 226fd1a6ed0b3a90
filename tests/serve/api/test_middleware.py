import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

from serve.api import middleware
from serve.api.application import build_api
from serve.api.keys import add_key
from serve.messages import GenerationEvent, GenerationJob
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, post_json, serving, wait_until
from tests.paths import REPOSITORY

GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return build_api(ScriptedPool(), ServeSettings(page=False))


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    with serving(app) as port:
        yield port


def test_importing_the_api_imports_neither_torch_nor_ray() -> None:
    code = "import serve.api.application, serve.api.listener, sys; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    root = REPOSITORY
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),  # without the page
        ("GET", "/page/index.html", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/%ff%00", 404, "model_not_found"),
        ("POST", "/v1/images/variations", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
        ("GET", "/page/", 404, "not_found"),
        ("GET", "/v1/images/generations/", 405, "method_not_allowed"),
        ("GET", "//v1/models", 404, "not_found"),
    ],
)  # fmt: skip
def test_the_routers_errors_are_error_objects(port: int, method: str, path: str, status: int, code: str) -> None:
    reply = ask(port, method, path)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/json"
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/docs"),
        ("GET", "/openapi.json"), ("POST", "/v1/images/generations"), ("POST", "/v1/images/edits"), ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"), ("POST", "/v1/tokenize"),
    ],
)  # fmt: skip
def test_a_slash_at_the_end_changes_no_path(port: int, method: str, path: str) -> None:
    plain, *others = [ask(port, method, path + end, body=b"{}" if method == "POST" else b"") for end in ("", "/", "//")]
    assert plain.status in (200, 400)
    assert {other.status for other in others} == {plain.status}


def test_a_slash_at_the_end_opens_no_path(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.yaml", "shop", scopes=["generate"])
    headers = {"authorization": f"Bearer {key}"}
    with serving(build_api(ScriptedPool(), ServeSettings(page=False, keys_file=str(tmp_path / "keys.yaml")))) as port:
        assert ask(port, "GET", "/metrics/", headers=headers).error["code"] == "insufficient_scope"
        assert ask(port, "GET", "/v1/models/").error["code"] == "missing_api_key"


def test_every_reply_has_a_request_id_and_security_headers(port: int) -> None:
    ids = set()
    for reply in (
        ask(port, "GET", "/healthz"),
        ask(port, "GET", "/nowhere"),
        post_json(port, GENERATE, {"prompt": "a"}),
        post_json(port, GENERATE, {"prompt": "a", "stream": True}),
        post_json(port, GENERATE, {}),
        ask(port, "GET", "/v1/models", headers={"host": "evil.example"}),
    ):
        ids.add(reply.headers["x-request-id"])
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "access-control-allow-origin" not in reply.headers
    assert len(ids) == 6


def test_a_clients_request_id_is_kept_only_if_short_and_plain(port: int) -> None:
    good = ask(port, "GET", "/healthz", headers={"x-request-id": "job-7.a_B"})
    assert good.headers["x-request-id"] == "job-7.a_B"
    for bad in ("a" * 65, "a b", "a;b", "\xe9", "<script>", "a\tb"):
        reply = ask(port, "GET", "/healthz", headers={"x-request-id": bad})
        assert re.fullmatch(r"req_[0-9a-f]{24}", reply.headers["x-request-id"])


def test_two_requests_with_one_id_are_two_jobs() -> None:
    pool = ScriptedPool()
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        replies = [post_json(port, GENERATE, {"prompt": "a"}, x_request_id="same") for _ in range(2)]
    assert {reply.json()["request_id"] for reply in replies} == {"same"}
    assert len({job.request_id for job in pool.jobs}) == 2


def test_no_header_of_a_client_changes_a_limit(port: int) -> None:
    """Headers that control Ray Serve or method overrides have no effect; those of proxies: test_access.py."""
    control_headers = {
        "x_request_timeout_seconds": "0",
        "x_request_disconnect_disabled": "?1",
        "x_http_method_override": "DELETE",
        "x_stainless_read_timeout": "1e9",
        "serve_multiplexed_model_id": "x",
    }
    body = {"prompt": "a", "seed": 3}
    plain, other = post_json(port, GENERATE, body), post_json(port, GENERATE, body, **control_headers)
    assert plain.json()["data"] == other.json()["data"]
    named = {
        "x_forwarded_for": "127.0.0.1",
        "x_forwarded_host": "localhost",
        "forwarded": "for=127.0.0.1;host=localhost",
    }
    assert post_json(port, GENERATE, body, host="evil.example", **control_headers, **named).status == 403


def _lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "serve.requests"]


def test_one_log_line_per_request_without_the_caption_and_the_user(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="serve.requests"):
        body = {"prompt": "비밀 니트", "user": "홍길동", "safety_identifier": "길동", "n": 2, "candidates": 3}
        post_json(port, GENERATE, body, x_stainless_retry_count="1")
        post_json(port, GENERATE, body | {"stream": True})
        post_json(port, GENERATE, body | {"비밀": 1})
        ask(port, "GET", "/%EB%B9%84%EB%B0%80")
        wait_until(lambda: len(_lines(caplog)) == 4)  # written after the last byte
    lines = _lines(caplog)
    assert [line["status"] for line in lines] == [200, 200, 400, 404]
    first = lines[0]
    assert (first["route"], first["key_id"], first["n"], first["candidates"], first["retry"]) == (
        GENERATE,
        "local",
        2,
        3,
        1,
    )
    assert first["seconds"] >= 0
    assert lines[2]["code"] == "unknown_parameter"
    assert lines[3]["route"] == "other"
    assert not re.search("비밀|길동", caplog.text)


def test_captions_are_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    settings = ServeSettings(page=False, log_prompts=True)
    with caplog.at_level(logging.INFO, logger="serve.requests"), serving(build_api(ScriptedPool(), settings)) as port:
        post_json(port, GENERATE, {"prompt": "비밀 니트", "user": "홍길동"})
        wait_until(lambda: len(_lines(caplog)) == 1)
    assert _lines(caplog)[0]["prompt"] == "비밀 니트"
    assert "길동" not in caplog.text


def test_requests_are_counted_by_route_and_status(app: FastAPI, port: int) -> None:
    def count(name: str, **labels: str) -> float:
        return app.state.metrics.registry.get_sample_value(name, labels) or 0.0

    before = count("kodalle_requests_total", route=GENERATE, status="400")
    images = count("kodalle_images_total")
    rejected = count("kodalle_rejected_total", reason="missing_required_parameter")
    post_json(port, GENERATE, {})
    post_json(port, GENERATE, {"prompt": "a", "n": 3})
    for number in range(5):
        ask(port, "GET", f"/random/{number}")
    wait_until(lambda: count("kodalle_requests_in_flight") == 0)
    assert count("kodalle_requests_total", route=GENERATE, status="400") == before + 1
    assert count("kodalle_images_total") == images + 3
    assert count("kodalle_rejected_total", reason="missing_required_parameter") == rejected + 1
    text = app.state.metrics.text()
    assert "/random/" not in text
    assert f'kodalle_request_seconds_count{{route="{GENERATE}"}}' in text


def test_an_internal_error_is_a_500_with_the_error_object(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> bool:
        raise KeyError("비밀")

    pool = ScriptedPool()
    monkeypatch.setattr(pool, "ready", broken)
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        reply = ask(port, "GET", "/readyz")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "비밀" not in reply.body.decode()


def test_without_the_middleware_an_error_has_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async def through(self: middleware.ApiMiddleware, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    def no_event(_: GenerationJob) -> GenerationEvent:
        raise KeyError

    async def broken(job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        yield no_event(job)

    monkeypatch.setattr(middleware.ApiMiddleware, "__call__", through)
    with serving(build_api(ScriptedPool(broken), ServeSettings(page=False))) as port:
        reply = ask(port, "GET", "/healthz")
        assert "x-request-id" not in reply.headers
        assert post_json(port, GENERATE, {"prompt": "a"}).headers["content-type"].startswith("text/plain")


def test_a_slash_at_the_end_names_the_same_list_and_model() -> None:
    with serving(build_api(ScriptedPool(), ServeSettings(page=False))) as port:
        for path in ("/v1/models", "/v1/models/tiny"):
            assert ask(port, "GET", f"{path}/").json() == ask(port, "GET", path).json()


@pytest.mark.parametrize("disposition", ['name="mask"', 'name="mask"; filename=""', 'name="mask"; filename="mask.png"'])
def test_an_empty_mask_part_of_an_edit_counts_as_absent(disposition: str) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    parts = {
        'name="prompt"': b"a",
        'name="n"': b"1.0",
        disposition: b"",
        'name="image"; filename="a"': picture.getvalue(),
    }
    body = b"".join(
        b"--x\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), data)
        for head, data in parts.items()
    )
    pool = ScriptedPool()
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        reply = ask(port, "POST", "/v1/images/edits", body=body + b"--x--\r\n", headers=headers)
    assert reply.status == 200, reply.body
    assert pool.jobs[0].init_image is not None
    assert pool.jobs[0].init_image.mask_image is None
