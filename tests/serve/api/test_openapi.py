import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from schemathesis.core.failures import FailureGroup
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.data.caption_guide import CaptionForm, CaptionGuide, FormAttribute
from serve.api.application import build_api
from serve.api.embeddings import EmbeddingsRequest, RerankRequest
from serve.api.errors import FAILURES, Failure
from serve.api.openapi import describe
from serve.api.openapi_page import described_page
from serve.api.schemas import EditJsonRequest, EditRequest, GenerationRequest
from serve.api.validation import read_request
from serve.local_pool import LocalPool
from serve.settings import Limits, ServeSettings
from tests.live_server import INFO, ScriptedPool, ask, serving
from tests.schema_cases import send_cases

SETTINGS = ServeSettings(limits=Limits(max_candidates=7, max_images=3, max_prompt_characters=77))


@pytest.fixture(scope="module")
def port(kodalle_run: Path) -> Iterator[int]:
    limits = Limits(max_candidates=3, max_images=2, max_partials=2)
    settings = ServeSettings(model=str(kodalle_run / "model"), default_candidates=1, page=False, limits=limits)
    pool = LocalPool(settings)
    try:
        with serving(build_api(pool, settings)) as port:
            yield port
    finally:
        pool.close()


@pytest.mark.slow
def test_generated_requests_get_the_documented_responses(port: int) -> None:
    outcome = send_cases(f"http://127.0.0.1:{port}", per_operation=15, seed=20261121)
    assert outcome.sent >= 90
    assert {200, 400, 404} == set(outcome.statuses)
    assert outcome.operations["positive POST /v1/images/generations"] >= 10
    assert outcome.operations["positive POST /v1/images/edits"] >= 10


@pytest.mark.slow
def test_generated_requests_detect_errors_of_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failure, "body", lambda _: b'{"detail": "as in stock FastAPI"}')
    app = build_api(ScriptedPool(), ServeSettings(page=False))
    with serving(app) as port, pytest.raises(FailureGroup, match='"error" is a required property'):
        send_cases(f"http://127.0.0.1:{port}", per_operation=10, seed=1)


def test_every_field_is_documented_with_the_running_servers_limits() -> None:
    document = describe(SETTINGS, INFO)["components"]["schemas"]
    assert set(document["GenerationRequest"]["properties"]) == set(GenerationRequest.model_fields)
    unsupported = {"complexity", "frame_count", "frame_duration_ms", "svg", "markup"}
    assert set(document["EditRequest"]["properties"]) == set(EditRequest.model_fields) - unsupported | {"image", "mask"}
    fields = document["GenerationRequest"]["properties"]
    assert {"type": "integer", "minimum": 1, "maximum": 7} in fields["candidates"]["anyOf"]
    assert {"type": "integer", "minimum": 1, "maximum": 3} in fields["n"]["anyOf"]
    assert fields["prompt"]["maxLength"] == 77
    assert fields["size"]["enum"] == ["auto", "32x32", "1024x1024", None]
    assert fields["background"]["enum"] == ["opaque", "auto", None]
    of_cut_outs = describe(SETTINGS, replace(INFO, ground="#eeeeec"))["components"]["schemas"]
    assert of_cut_outs["GenerationRequest"]["properties"]["background"]["enum"] == [
        "opaque",
        "auto",
        "transparent",
        None,
    ]
    for kind in (EditJsonRequest, EmbeddingsRequest, RerankRequest):
        assert set(document[kind.__name__]["properties"]) == set(kind.model_fields)
        assert all(field.get("description") for field in document[kind.__name__]["properties"].values())
    assert all(field["description"] for field in fields.values())


def test_every_route_documents_its_responses() -> None:
    document = describe(SETTINGS, INFO)
    generation = document["paths"]["/v1/images/generations"]["post"]
    assert set(generation["responses"]) == {
        "200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504",
    }  # fmt: skip
    descriptions = " ".join(answer["description"] for answer in generation["responses"].values())
    elsewhere = {"method_not_allowed", "client_closed_request"}
    assert set(FAILURES) - elsewhere <= set(re.findall(r"\w+", descriptions))
    examples = generation["requestBody"]["content"]["application/json"]["examples"]
    requests = [read_request(GenerationRequest, example["value"]) for example in examples.values()]
    assert {request.prompt for request in requests} == set(INFO.caption_guide.examples)
    assert describe(SETTINGS, replace(INFO, caption_guide=CaptionGuide()))["paths"]  # a model without examples


def test_the_caption_guide_of_a_model_is_described_field_by_field() -> None:
    schemas = describe(SETTINGS, INFO)["components"]["schemas"]
    assert schemas["Model"]["properties"]["caption_guide"] == {"$ref": "#/components/schemas/CaptionGuide"}
    for name, kind in (("CaptionGuide", CaptionGuide), ("CaptionForm", CaptionForm), ("FormAttribute", FormAttribute)):
        not_sent = {"words"} if kind is CaptionGuide else set()
        assert schemas[name]["properties"].keys() == kind.model_fields.keys() - not_sent


def test_the_html_page_needs_no_scripts_and_no_network() -> None:
    page = described_page(describe(SETTINGS, INFO))
    assert "POST /v1/images/edits" in page
    assert "integer 1 to 7" in page
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert not re.search(r"<script|https?:|style=", page)
    hostile = describe(SETTINGS, INFO)
    hostile["paths"]["/v1/models"]["get"]["summary"] = "<script>"
    assert "<script>" not in described_page(hostile)


def test_the_document_and_the_page_are_served() -> None:
    with serving(build_api(ScriptedPool(), ServeSettings(page=False))) as port:
        assert ask(port, "GET", "/openapi.json").json()["openapi"] == "3.1.0"
        docs = ask(port, "GET", "/docs")
    assert docs.headers["content-type"].startswith("text/html")


def _below(app: ASGIApp, prefix: str) -> Any:
    """`app` as Ray Serve calls it with a `route_prefix`: the whole path, and the prefix as its root path."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)

    return called


@pytest.mark.parametrize(("root_path", "is_rays"), [("", False), ("/kodalle", False), ("/kodalle", True)])
def test_links_stay_below_the_path_that_a_proxy_publishes(root_path: str, is_rays: bool) -> None:
    app = build_api(ScriptedPool(), ServeSettings(root_path="" if is_rays else root_path))
    with serving(_below(app, root_path) if is_rays else app) as port:
        prefixes = {root_path} if is_rays else {"", root_path}  # proxies that strip the path, and others that do not
        for prefix in prefixes:
            assert ask(port, "GET", f"{prefix}/openapi.json").json()["servers"] == [{"url": root_path or "/"}]
            assert ask(port, "GET", f"{prefix}/v1/models").json()["data"][0]["id"] == "tiny"
            for path in ("/healthz", "/", "/page/main.js"):
                assert ask(port, "GET", prefix + path).status == 200
            for path in ("/docs", "/"):
                links = re.findall(r'(?:href|src)="(?!data:)([^"#]+)', ask(port, "GET", prefix + path).body.decode())
                assert links
                assert all(re.match(r"[a-z]+[./]", link) for link in links), links
                assert {ask(port, "GET", f"{prefix}/{link}").status for link in links} == {200}
        assert ask(port, "GET", "/other/v1/models").status == 404
