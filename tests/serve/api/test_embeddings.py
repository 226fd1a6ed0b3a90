"""/v1/embeddings and /v1/rerank: KoCLIP's own embeddings, alone as in lists, and refusals that name the place."""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from engine.pipeline.pipeline import Pipeline
from serve.api.application import build_api
from serve.api.embeddings import COST
from serve.api.keys import add_key
from serve.local_pool import LocalPool
from serve.messages import EmbeddingJob, Embeddings, Refused
from serve.settings import Limits, ServeSettings
from serve.worker import embedding
from tests.live_server import ScriptedPool, post_json, serving

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모", "노랑 바탕에 검정 네모"]
EMBED, RERANK = "/v1/embeddings", "/v1/rerank"


def data_url(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="module")
def pool(kodalle_run: Path) -> Iterator[LocalPool]:
    pool = LocalPool(ServeSettings(model=str(kodalle_run / "model"), model_id="tiny"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def port(pool: LocalPool) -> Iterator[int]:
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue", "yellow")]


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_openais_client_gets_the_rankers_embeddings_in_either_encoding(
    client: openai.OpenAI, pipeline: Pipeline
) -> None:
    """Its client asks for base64 by itself."""
    wanted = pipeline.embed_captions(CAPTIONS).vectors.numpy()
    for encoding in ({}, {"encoding_format": "base64"}, {"encoding_format": "float"}):
        answer: Any = client.embeddings.create(model="tiny", input=CAPTIONS, **encoding)  # type: ignore[arg-type]
        assert [one.index for one in answer.data] == [0, 1, 2]
        vectors = [one.embedding for one in answer.data]
        if encoding.get("encoding_format") == "base64":
            vectors = [np.frombuffer(base64.b64decode(one), "<f4") for one in vectors]
        assert np.array_equal(np.array(vectors, np.float32), wanted), "bit for bit"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
    assert np.allclose(np.linalg.norm(wanted, axis=1), 1, atol=1e-5)


def test_each_caption_and_picture_is_embedded_as_if_it_were_alone(
    port: int, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_AT_ONCE", 2)
    items: list[Any] = [
        CAPTIONS[0],
        {"image": data_url(pictures[0])},
        {"text": CAPTIONS[1]},
        data_url(pictures[1], "WEBP"),
    ]
    items = items * 2
    together = [one["embedding"] for one in post_json(port, EMBED, {"input": items}).json()["data"]]
    alone = [post_json(port, EMBED, {"input": one}).json()["data"][0]["embedding"] for one in items[:4]]
    assert together == alone * 2
    assert len({tuple(one) for one in alone}) == 4


def test_pictures_are_seen_as_generated_ones_are(port: int, pipeline: Pipeline, pool: LocalPool) -> None:
    """The middle square at the model's size; transparency on the model's ground."""
    rng = np.random.default_rng(5)
    photo = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    square = photo.crop((15, 0, 75, 60))
    vectors = [
        one["embedding"]
        for one in post_json(port, EMBED, {"input": [data_url(photo), data_url(square)]}).json()["data"]
    ]
    assert vectors[0] == vectors[1]
    assert pool.worker.info.ground is not None
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    plain = Image.new("RGB", (32, 32), pool.worker.info.ground)
    answer = post_json(port, EMBED, {"input": [data_url(clear), data_url(plain)]}).json()
    assert answer["data"][0]["embedding"] == answer["data"][1]["embedding"]
    assert answer["usage"]["total_tokens"] == 0


def test_words_that_the_ranker_does_not_know_are_named(port: int) -> None:
    answer = post_json(port, EMBED, {"input": ["빨강 네모", "린넨 셔츠 " * 20]}).json()
    assert answer["words_unknown"] == ["린넨", "셔츠"]
    assert answer["tokens_unknown"] == 40
    assert answer["tokens_cut"] == 42 - 12


# -------------------------------------------------------------------------------------------------------------- rerank


def test_a_generated_image_has_the_score_that_it_was_ranked_by(port: int) -> None:
    generated = post_json(
        port, "/v1/images/generations", {"prompt": CAPTIONS[0], "n": 4, "candidates": 6, "seed": 5}
    ).json()
    documents = [{"image": f"data:image/png;base64,{one['b64_json']}"} for one in reversed(generated["data"])]
    answer = post_json(port, RERANK, {"query": CAPTIONS[0], "documents": documents}).json()
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    wanted = [one["clip_score"] for one in reversed(generated["data"])]
    assert [scores[number] for number in range(4)] == pytest.approx(wanted, abs=5e-3), "but for 8 bits a pixel"
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    first = post_json(port, RERANK, {"query": CAPTIONS[0], "documents": documents, "top_n": 2}).json()
    assert first["results"] == answer["results"][:2]


def test_scores_are_the_embeddings_products_whatever_is_compared(port: int, pictures: list[Image.Image]) -> None:
    items: list[Any] = [*CAPTIONS, *map(data_url, pictures)]
    vectors = [np.array(one["embedding"]) for one in post_json(port, EMBED, {"input": items}).json()["data"]]
    for query in (0, 4):
        answer = post_json(port, RERANK, {"query": items[query], "documents": items, "return_documents": True}).json()
        for one in answer["results"]:
            assert one["relevance_score"] == pytest.approx(float(vectors[query] @ vectors[one["index"]]), abs=1e-5)
            assert one.get("document") == ({"text": items[one["index"]]} if one["index"] < 3 else None)
        scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert scores[query] == pytest.approx(
            max(scores.values()), abs=1e-5
        )  # pictures of an untrained model nearly tie
        assert answer["id"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (EMBED, {}, "missing_required_parameter", "input"),
        (EMBED, {"input": []}, "invalid_value", "input"),
        (EMBED, {"input": ""}, "invalid_value", "input"),
        (EMBED, {"input": ["a", "\u200b"]}, "invalid_value", "input[1]"),
        (EMBED, {"input": [1, 2]}, "invalid_value", "input"),
        (EMBED, {"input": [[1, 2]]}, "invalid_value", "input"),
        (EMBED, {"input": ["a", 2]}, "invalid_type", "input[1]"),
        (EMBED, {"input": None}, "invalid_type", "input"),
        (EMBED, {"input": {"text": "a", "image": "b"}}, "invalid_type", "input"),
        (EMBED, {"input": {"audio": "a"}}, "invalid_type", "input.audio"),
        (EMBED, {"input": ["a"] * 5}, "invalid_value", "input"),
        (EMBED, {"input": "a" * 1001}, "invalid_value", "input"),
        (EMBED, {"input": {"image": "https://example.com/a.png"}}, "invalid_image", "input.image"),
        (EMBED, {"input": ["data:image/png;base64,AAAA"]}, "invalid_image", "input[0]"),
        (EMBED, {"input": "a", "dimensions": 8}, "invalid_value", "dimensions"),
        (EMBED, {"input": "a", "model": "text-embedding-3-small"}, "model_not_found", "model"),
        (EMBED, {"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        (EMBED, {"input": "a", "inputs": "a"}, "unknown_parameter", "inputs"),
        (RERANK, {"query": ["a"], "documents": ["a"]}, "invalid_type", "query"),
        (RERANK, {"query": "a", "documents": []}, "invalid_value", "documents"),
        (RERANK, {"query": "a", "documents": ["b", {"image": 1}]}, "invalid_type", "documents[1].image"),
        (RERANK, {"query": "a", "documents": ["a"], "top_n": 0}, "invalid_value", "top_n"),
    ],
)
def test_bad_requests_name_the_place(path: str, body: dict[str, Any], code: str, param: str) -> None:
    settings = ServeSettings(page=False, limits=Limits(max_embeddings=4))
    with serving(build_api(ScriptedPool(), settings)) as port:
        reply = post_json(port, path, body)
    assert (reply.error["code"], reply.error["param"]) == (code, param)
    assert reply.status == (404 if code == "model_not_found" else 400)
    assert "`prompt`" not in reply.error["message"], "the request has no such field"


def test_all_pictures_of_a_request_share_a_limit_of_pixels() -> None:
    settings = ServeSettings(page=False, limits=Limits(max_embedded_pixels=2500))
    pictures = [{"image": data_url(Image.new("RGB", (40, 40)))}] * 2
    with serving(build_api(ScriptedPool(), settings)) as port:
        assert post_json(port, EMBED, {"input": pictures[:1]}).status == 200
        refused = post_json(port, EMBED, {"input": pictures})
    assert (refused.error["code"], refused.error["param"]) == ("image_too_large", "input[1].image")


def test_a_model_without_a_ranker_embeds_nothing() -> None:
    pool = ScriptedPool()
    pool.info = replace(pool.info, embedding_width=0, has_ranker=False)
    with serving(build_api(pool, ServeSettings(page=False))) as port:
        assert post_json(port, EMBED, {"input": "a"}).error["code"] == "unsupported_parameter"


def test_keys_and_rates_count_embeddings_as_tenths_of_images(tmp_path: Path) -> None:
    key, pool = add_key(tmp_path / "keys.yaml", "search", scopes=["generate"], per_minute=60), ScriptedPool()
    settings = ServeSettings(page=False, keys_file=str(tmp_path / "keys.yaml"))
    app = build_api(pool, settings)
    with serving(app) as port:
        assert post_json(port, EMBED, {"input": "a"}).error["code"] == "missing_api_key"
        assert post_json(port, EMBED, {"input": ["a", "b"]}, authorization=f"Bearer {key}").status == 200
        assert pool.taken == [("search", 60.0, 2 * COST)]
        pool.wait_s = 3.0
        refused = post_json(port, RERANK, {"query": "a", "documents": ["b"]}, authorization=f"Bearer {key}")
        assert (refused.status, refused.headers["retry-after"]) == (429, "3")
        assert "kodalle_embeddings_total 2.0" in app.state.metrics.text()


# --------------------------------------------------------------------------------------------------------- the worker


@pytest.fixture
def lone_pool(kodalle_run: Path) -> Iterator[LocalPool]:
    pool = LocalPool(ServeSettings(model=str(kodalle_run / "model"), num_slots=2))
    yield pool
    pool.close()


def test_a_full_queue_refuses_and_a_cancelled_job_leaves_its_other_parts_out(
    lone_pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_MOST_WAITING", 40)
    worker, release, calls = lone_pool.worker, threading.Event(), []
    embed = worker.pipeline.embed_captions

    def slow(captions: list[str]) -> Any:
        calls.append(len(captions))
        release.wait(20)
        return embed(captions)

    monkeypatch.setattr(worker.pipeline, "embed_captions", slow)

    async def run() -> None:
        job = EmbeddingJob("one", tuple(CAPTIONS * 11))
        first = asyncio.create_task(worker.embed(job))
        while not calls:
            await asyncio.sleep(0.01)
        refused = await worker.embed(job)
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.retry_after_s) == ("queue_full", 1.0)
        first.cancel()
        release.set()
        await asyncio.wait({first})
        assert isinstance(await worker.embed(EmbeddingJob("two", ("빨강",))), Embeddings)

    asyncio.run(run())
    assert calls == [16, 1], "of 33 captions the first part alone"


def test_a_stopping_worker_answers_what_waits(lone_pool: LocalPool) -> None:
    async def run() -> Any:
        waiting = [
            asyncio.create_task(lone_pool.worker.embed(EmbeddingJob(str(n), tuple(CAPTIONS)))) for n in range(20)
        ]
        await asyncio.sleep(0)
        await asyncio.to_thread(lone_pool.worker.close)
        return await asyncio.wait_for(asyncio.gather(*waiting), 20), await lone_pool.worker.embed(
            EmbeddingJob("late", ("a",))
        )

    answers, late = asyncio.run(run())
    assert {type(one) for one in answers} <= {Embeddings, Refused}
    assert {one.reason for one in answers if isinstance(one, Refused)} <= {"failed"}
    assert late.reason == "draining"
