import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from serve.api.application import build_api
from serve.local_pool import LocalPool
from serve.settings import Limits, ServeSettings
from tests.byte_mutants import Template, attack, mutants
from tests.live_server import ask, post_json, serving
from tests.serve.api.test_forms import part, whole


def templates() -> list[Template]:
    """Valid requests of the routes that take bodies."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    plain = {"prompt": "빨강 네모", "n": 1, "candidates": 1, "seed": 7, "temperature": 0.5, "output_format": "jpeg"}
    stream = {"prompt": "빨강", "candidates": 2, "stream": True, "partial_images": 1, "progress": True, "user": "a"}
    fields = whole(
        part("prompt", "빨강 네모".encode()),
        part("candidates", b"1"),
        part("keep_rows", b"3"),
        part("image", file.getvalue(), filename="a.png"),
    )
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    edit = {"prompt": "빨강", "candidates": 1, "keep_rows": 3, "images": [{"image_url": url}]}
    generate = b"/v1/images/generations"
    return [
        Template(generate, b"application/json", json.dumps(plain).encode()),
        Template(generate, b"application/json", json.dumps(stream, ensure_ascii=False).encode()),
        Template(b"/v1/tokenize", b"application/json", b'{"prompt": "a"}'),
        Template(b"/v1/images/edits", b"application/json", json.dumps(edit).encode()),
        Template(b"/v1/embeddings", b"application/json", json.dumps({"input": ["a", {"image": url}]}).encode()),
        Template(b"/v1/rerank", b"application/json", json.dumps({"query": "a", "documents": [url, "b"]}).encode()),
        Template(b"/v1/images/edits", b"multipart/form-data; boundary=b0undary", fields),
    ]


@pytest.fixture(scope="module")
def port(kodalle_run: Path) -> Iterator[int]:
    """A complete server: API server, worker, a tiny trained model."""
    limits = Limits(max_candidates=4, body_timeout_s=1)
    settings = ServeSettings(model=str(kodalle_run / "model"), default_candidates=1, page=False, limits=limits)
    pool = LocalPool(settings)
    try:
        with serving(build_api(pool, settings)) as port:
            yield port
    finally:
        pool.close()


def test_the_templates_are_valid(port: int) -> None:
    for template in templates():
        headers = {"content-type": template.content_type.decode()}
        assert ask(port, "POST", template.path.decode(), body=template.body, headers=headers).status == 200


@pytest.mark.parametrize("count", [400, pytest.param(4000, marks=pytest.mark.soak)])
def test_mutated_requests_cause_no_server_error_and_no_reset(port: int, count: int) -> None:
    result = attack(port, templates(), count=count, seed=20261121)
    assert result.faults == []
    assert result.sent == count
    assert result.statuses[400] > 0.3 * count
    assert result.statuses[200] > 0.05 * count  # mutants that happen to be valid
    assert ask(port, "GET", "/readyz").status == 200
    assert post_json(port, "/v1/images/generations", {"prompt": "a"}).status == 200


def test_the_same_mutants_cause_faults_in_stock_fastapi() -> None:
    class Body(BaseModel):
        prompt: str
        n: int = 1
        seed: int = 0
        candidates: int = 1
        temperature: float = 1.0

    app = FastAPI()

    @app.post("/v1/images/generations")
    async def generate(body: Body) -> dict[str, str]:
        return {"prompt": body.prompt}

    with serving(app) as port:
        result = attack(port, templates()[:1], count=300, seed=1)
    assert sum(fault.startswith("status 5") for fault, _ in result.faults) >= 10
    assert sum("without the error object" in fault for fault, _ in result.faults) >= 50


def test_mutants_are_the_same_for_the_same_seed() -> None:
    one, again, other = (list(mutants(templates(), count=50, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
