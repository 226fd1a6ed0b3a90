"""Clients that people have already, unmodified, as programs of their own against a served model.

LiteLLM takes seconds to import: `make soak` runs it.

OpenAI's for Python is tested where each feature is (tests/serve/api), an assistant's in tests/serve/test_mcp_server.py.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.pipeline.pipeline import Pipeline
from serve.api.application import build_api
from serve.local_pool import LocalPool
from serve.settings import ServeSettings
from tests.live_server import serving
from tests.paths import REPOSITORY

pytestmark = pytest.mark.slow

CAPTION = "빨강 바탕에 파랑 네모"
FOLDER = Path(__file__).parent
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def url(kodalle_run: Path) -> Iterator[str]:
    settings = ServeSettings(model=str(kodalle_run / "model"), model_id="tiny", page=False)
    pool = LocalPool(settings)
    with serving(build_api(pool, settings)) as port:
        yield f"http://127.0.0.1:{port}"
    pool.close()


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


def output(*command: str, **environment: str) -> Any:
    """The JSON line that a client prints last."""
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_openais_client_for_node(url: str, pipeline: Pipeline) -> None:
    if NODE is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node" / "node_modules" / "openai").is_dir():
        pytest.skip("its client is not installed: make system-packages, or npm ci in tests/serve/clients/node")
    found = output(NODE, str(FOLDER / "node" / "client.mjs"), url)
    generation = pipeline([CAPTION], candidates=3, seed=7)[0]
    for image, best in zip(found["images"], generation.top(2), strict=True):
        assert np.array_equal(pixels(image), np.asarray(best.image.resize((64, 64), Image.Resampling.LANCZOS)))
    assert (found["model"], found["size"], found["seeds"]) == ("tiny", "64x64", [7, 7])
    assert set(found["events"][:-1]) <= {"image_generation.partial_image"}
    assert found["events"][-1] == "image_generation.completed"
    assert pixels(found["edited"]).shape == (32, 32, 3)
    assert np.array_equal(
        np.array(found["embedding"], np.float32), pipeline.embed_captions([CAPTION]).vectors[0].numpy()
    )
    assert found["error"] == {"type": "BadRequestError", "status": 400, "code": "invalid_value", "param": "n"}


@pytest.mark.soak
def test_litellm(url: str, pipeline: Pipeline) -> None:
    program = str(FOLDER / "litellm_client.py")
    found = output(sys.executable, program, url, CAPTION, LITELLM_LOCAL_MODEL_COST_MAP="True")
    generation = pipeline([CAPTION], candidates=3, seed=7)[0]
    for image, best in zip(found["images"], generation.top(2), strict=True):
        assert np.array_equal(pixels(image), np.asarray(best.image))
    wanted = pipeline.embed_captions([CAPTION, "초록 네모"]).vectors
    assert np.array_equal(np.array(found["embeddings"], np.float32), wanted.numpy())
    (result,) = found["results"]
    assert result["index"] == 1, "the caption itself is nearest to it"
    assert result["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert "This server's model is `tiny`" in found["error"]
