"""Browser apps on other origins: what a page on a listed origin may read, and that other pages may not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import InputError
from serve.api.application import build_api
from serve.api.keys import make_key
from serve.settings import ServeSettings, read_settings
from tests.live_server import Reply, ScriptedPool, ask, serving

APP, OTHER = "https://studio.example", "https://evil.example"
GENERATE = "/v1/images/generations"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}


def preflight(port: int, origin: str, path: str = GENERATE, **more: str) -> Reply:
    return ask(port, "OPTIONS", path, headers=PREFLIGHT | {"origin": origin} | more)


def cors_headers(reply: Reply) -> list[str]:
    return [name for name in reply.headers if name.startswith("access-control-")]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    plain, entry = make_key("shop", scopes=["generate"], per_minute=60)
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [entry.model_dump(mode="json", by_alias=True, exclude_none=True)]}))
    return path, plain


def test_a_listed_apps_preflight_needs_no_key_and_its_requests_and_errors_can_be_read(key: tuple[Path, str]) -> None:
    pool = ScriptedPool()
    settings = ServeSettings(keys_file=str(key[0]), allowed_origins=("http://localhost:3000", APP))
    with serving(build_api(pool, settings)) as port:
        for path in (GENERATE, "/v1/images/edits", "/v1/models", "/nothing"):
            reply = preflight(port, APP, path)
            assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, APP)
            assert reply.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
            assert "POST" in reply.headers["access-control-allow-methods"]
            assert reply.headers["x-request-id"]
        private = preflight(port, APP, **{"access-control-request-private-network": "true"})
        assert private.headers["access-control-allow-private-network"] == "true"

        def post(body: Any, **headers: str) -> Reply:
            return ask(port, "POST", GENERATE, json_body=body, headers={"origin": APP} | headers)

        bearer = {"authorization": f"Bearer {key[1]}"}
        replies = [post({"prompt": "a"}, **bearer), post({"prompt": "a"}), post({"promt": "a"}, **bearer)]
        replies.append(ask(port, "GET", "/nothing", headers={"origin": APP} | bearer))
        replies.append(ask(port, "OPTIONS", GENERATE, headers={"origin": APP} | bearer))
        pool.wait_s = 3.0
        replies.append(post({"prompt": "a"}, **bearer))
        assert [reply.status for reply in replies] == [200, 401, 400, 404, 405, 429]
        for reply in replies:
            assert reply.headers["access-control-allow-origin"] == APP
            assert {"x-request-id", "retry-after"} <= set(reply.headers["access-control-expose-headers"].split(", "))
            assert reply.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.slow
def test_other_origins_and_servers_without_a_list_get_no_such_header(key: tuple[Path, str]) -> None:
    bearer = {"authorization": f"Bearer {key[1]}"}
    for origins, asking in (((), APP), ((APP,), OTHER), ((APP,), "null"), ((APP,), f"{APP}.evil.example")):
        settings = ServeSettings(keys_file=str(key[0]), allowed_origins=origins)
        with serving(build_api(ScriptedPool(), settings)) as port:
            refused, answered = (
                preflight(port, asking),
                ask(port, "GET", "/v1/models", headers={"origin": asking} | bearer),
            )
            assert (refused.status, refused.error["code"]) == (401, "missing_api_key")
            assert answered.status == 200
            assert cors_headers(refused) + cors_headers(answered) == []
            assert answered.headers.get("vary") == ("Origin" if origins else None)  # or a cache mixes the two up


def test_a_server_without_keys_answers_listed_apps_on_this_machine_only() -> None:
    with serving(build_api(ScriptedPool(), ServeSettings(allowed_origins=(APP,)))) as port:
        assert preflight(port, APP).status == 200
        body, headers = {"prompt": "a"}, {"origin": APP}
        assert ask(port, "POST", GENERATE, json_body=body, headers=headers).status == 200
        assert ask(port, "POST", GENERATE, json_body=body, headers={"origin": OTHER}).error["code"] == "cross_site"
        rebound = ask(port, "POST", GENERATE, json_body=body, headers=headers | {"host": "evil.example"})
        assert rebound.error["code"] == "not_local"
        twice = {"origin": f"{APP}\r\norigin: {OTHER}"}
        assert ask(port, "POST", GENERATE, json_body=body, headers=twice).error["code"] == "cross_site"


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "", "studio.example", f"{APP}/", f"{APP}/app", f"{APP}?a", "https://Studio.example", f"{APP}:443",
     "http://a.example:80", "https://*.example", "https://user@studio.example", f"{APP} {OTHER}", 3],
)  # fmt: skip
def test_an_origin_that_no_browser_sends_is_an_error_with_a_remedy(origin: Any) -> None:
    with pytest.raises(InputError, match="allowed_origins"):
        read_settings({"allowed_origins": [APP, origin]}, source="serve.yaml")


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000", "http://[::1]:8080", "tauri://localhost"])
def test_origins_of_apps_are_settings(origin: str) -> None:
    assert read_settings({"allowed_origins": [origin]}, source="serve.yaml").allowed_origins == (origin,)
