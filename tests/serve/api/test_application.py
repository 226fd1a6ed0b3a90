import base64
import io
import socket
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from serve.api.application import build_api
from serve.local_pool import LocalPool
from serve.settings import ServeSettings
from serve.worker.previews import preview_rows
from tests.live_server import post_json, request_bytes, serving, wait_until

GENERATE = "/v1/images/generations"
PROMPT = "빨강 바탕에 파랑 네모"


@pytest.fixture(scope="module")
def pool(kodalle_run: Path) -> Iterator[LocalPool]:
    """A worker with a tiny trained model: 32 pixels, 8 x 8 tokens."""
    pool = LocalPool(ServeSettings(model=str(kodalle_run / "model"), model_id="tiny"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def port(pool: LocalPool) -> Iterator[int]:
    with serving(build_api(pool, ServeSettings(default_candidates=4, page=False))) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def decoded_image(b64: str | None, form: str = "PNG") -> np.ndarray:
    assert b64 is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert image.format == form
    return np.asarray(image.convert("RGB"))


def init_image() -> tuple[bytes, bytes, np.ndarray, np.ndarray]:
    """An image of the model's size and a mask of OpenAI's type, as files and as arrays."""
    pixels = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    hole = np.zeros((32, 32), bool)
    hole[8:20, 12:24] = True
    mask = np.dstack([pixels, np.where(hole, 0, 255).astype(np.uint8)])
    files = []
    for array in (pixels, mask):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        files.append(file.getvalue())
    return files[0], files[1], pixels, hole


# ----------------------------------------------------------------------------------------------- through OpenAI's client


def test_images_are_ranked_and_have_their_seeds(client: openai.OpenAI) -> None:
    answer: Any = client.images.generate(
        prompt=PROMPT, n=2, size="32x32", extra_body={"seed": 2**64 - 1, "candidates": 5, "all_candidates": True}
    )
    assert [decoded_image(one.b64_json).shape for one in answer.data] == [(32, 32, 3)] * 2
    assert [one.rank for one in answer.data] == [1, 2]
    assert [one["rank"] for one in answer.candidates] == [3, 4, 5]
    scores = [(one.candidate, one.clip_score) for one in answer.data]
    scores += [(one["candidate"], one["clip_score"]) for one in answer.candidates]
    assert sorted(number for number, _ in scores) == [0, 1, 2, 3, 4]
    assert [score for _, score in scores] == sorted((score for _, score in scores), reverse=True)
    assert {one.seed for one in answer.data} == {2**64 - 1}
    assert answer.usage.output_tokens == 5 * 64
    assert {"queue", "prefill", "decode", "vqgan", "ranking", "encoding", "total"} <= answer.timings_s.keys()
    assert (answer.model, answer.request_id, answer.tokens_cut) == ("tiny", answer._request_id, 0)
    assert (answer.quality, answer.output_format, answer.size) == ("medium", "png", "32x32")


def test_the_same_seed_gives_the_same_bytes_streamed_or_not_alone_or_concurrently(client: openai.OpenAI) -> None:
    def generated(seed: int, **more: Any) -> list[str]:
        images: Any = client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": seed} | more).data
        return [one.b64_json for one in images]

    alone = {seed: generated(seed) for seed in range(4)}
    assert len({one for images in alone.values() for one in images}) == 12
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(generated, range(4))) == [alone[seed] for seed in range(4)]
    stream = client.images.generate(prompt=PROMPT, n=3, stream=True, partial_images=2, extra_body={"seed": 2})
    assert [event.b64_json for event in stream if event.type == "image_generation.completed"] == alone[2]


def test_a_random_seed_is_returned_and_gives_the_same_image_again(client: openai.OpenAI) -> None:
    first: Any = client.images.generate(prompt=PROMPT).data
    again: Any = client.images.generate(prompt=PROMPT, extra_body={"seed": first[0].seed}).data
    assert again[0].b64_json == first[0].b64_json
    other: Any = client.images.generate(prompt=PROMPT).data
    assert other[0].seed != first[0].seed


def test_previews_are_in_order_and_of_the_rows_generated_so_far(client: openai.OpenAI) -> None:
    """Any preview may be missing: one that is not decoded before the next of its candidate is due is dropped."""
    more = {"seed": 1, "candidates": 2, "progress": True, "all_candidates": True}
    events: list[Any] = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=3, n=2, extra_body=more))
    partials = [event for event in events if event.type == "image_generation.partial_image"]
    for number in (0, 1):
        indices = [event.partial_image_index for event in partials if event.image_index == number]
        assert indices == sorted(set(indices))
    for event in partials:
        assert event.image_index in (0, 1)
        assert (event.rows_generated, event.rows_total) == (preview_rows(3, 8)[event.partial_image_index], 8)
        assert decoded_image(event.b64_json).shape == (32, 32, 3)
    progress = [event.tokens_generated for event in events if event.type == "image_generation.progress"]
    assert progress == sorted(progress)
    assert [event.type for event in events[-2:]] == ["image_generation.completed"] * 2


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_each_format_is_as_requested(client: openai.OpenAI, form: Any) -> None:
    more = {} if form == "png" else {"output_compression": 80}
    answer: Any = client.images.generate(prompt=PROMPT, output_format=form, extra_body={"seed": 1} | more)
    assert decoded_image(answer.data[0].b64_json, form.upper()).shape == (32, 32, 3)
    assert answer.output_format == form


def test_inpainting_keeps_every_pixel_outside_the_mask(client: openai.OpenAI) -> None:
    image, mask, pixels, hole = init_image()
    answer: Any = client.images.edit(
        image=image, mask=mask, prompt=PROMPT, n=2, extra_body={"seed": 3, "candidates": 3}
    )
    assert len(answer.data) == 2
    for one in answer.data:
        generated = decoded_image(one.b64_json)
        assert (generated[~hole] == pixels[~hole]).all()
        assert (generated[hole] != pixels[hole]).any()
    assert answer.usage.input_tokens_details.image_tokens == 64


def test_an_image_without_a_mask_keeps_its_rows_and_can_be_streamed(client: openai.OpenAI) -> None:
    image, _, pixels, _ = init_image()
    stream = client.images.edit(image=[image], prompt=PROMPT, stream=True, extra_body={"keep_rows": 3, "seed": 3})
    events: list[Any] = list(stream)
    assert events[-1].type == "image_edit.completed"
    assert (decoded_image(events[-1].b64_json)[:12] == pixels[:12]).all()
    plain: Any = client.images.edit(image=image, prompt=PROMPT, extra_body={"keep_rows": 3, "seed": 3, "paste": False})
    assert (decoded_image(plain.data[0].b64_json)[:12] != pixels[:12]).any()


def test_two_init_images_are_rejected(client: openai.OpenAI) -> None:
    image = init_image()[0]
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.edit(image=[image, image], prompt=PROMPT)
    assert raised.value.param == "image[]"


def test_errors_are_openais_own_classes_with_code_and_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt=PROMPT, n=11)
    assert (bad.value.code, bad.value.param, bad.value.type) == ("invalid_value", "n", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.images.create_variation(image=init_image()[0])


def test_models_are_listed_and_found(client: openai.OpenAI, pool: LocalPool) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve("tiny") == model
    assert (model.id, model.owned_by, model.created) == ("tiny", "kodalle", pool.worker.info.created)
    assert model.image_size == 32  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-2")


# -------------------------------------------------------------------------------------------------------------- tokens


def test_tokenize_counts_the_tokens_that_the_model_reads(client: openai.OpenAI, port: int) -> None:
    counted = post_json(port, "/v1/tokenize", {"prompt": "빨강 네모"}).json()
    known = {"tokens_unknown": 0, "words_unknown": [], "unknown": [], "words_known": 2, "words_total": 2}
    assert counted == {"object": "tokens", "tokens": counted["tokens"], "limit": 12, "characters": 5} | known
    answer: Any = client.images.generate(prompt="빨강 네모", extra_body={"candidates": 1})
    assert answer.usage.input_tokens == counted["tokens"]
    long = "빨강 " * 50
    counted = post_json(port, "/v1/tokenize", {"prompt": long}).json()
    cut: Any = client.images.generate(prompt=long, extra_body={"candidates": 1})
    assert cut.tokens_cut == counted["tokens"] - 12 > 0
    assert post_json(port, "/v1/tokenize", {"prompt": ""}).json()["tokens"] == 2


def test_tokenize_reads_prompts_as_generation_does(client: openai.OpenAI, port: int) -> None:
    plain = post_json(port, "/v1/tokenize", {"prompt": "빨강 네모"}).json()
    for prompt in (unicodedata.normalize("NFD", "빨강 네모"), "\ufeff빨강\u200b 네\u00ad모"):
        assert post_json(port, "/v1/tokenize", {"prompt": prompt}).json() == plain
    assert post_json(port, "/v1/tokenize", {"prompt": "\u200b"}).json()["tokens"] == 2
    assert post_json(port, "/v1/tokenize", {"prompt": "a\x07"}).error["param"] == "prompt"


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_workers_slots(pool: LocalPool, port: int, stream: bool) -> None:
    body = f'{{"prompt": "{PROMPT}", "candidates": 60, "stream": {str(stream).lower()}}}'.encode()
    before = _images_generated(pool)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request_bytes("POST", GENERATE, body=body, port=port))
            wait_until(lambda: pool.worker.slots_in_use > 0)
        wait_until(lambda: pool.worker.num_active == 0)
        wait_until(lambda: pool.worker.slots_in_use + pool.worker.queued_sequences == 0)
    assert _images_generated(pool) == before, "cancelled, not finished"


def _images_generated(pool: LocalPool) -> str:
    return next(
        line for line in pool.worker.metrics_text().splitlines() if line.startswith("kodalle_images_generated_total ")
    )


def test_a_full_queue_is_429_with_retry_after(kodalle_run: Path) -> None:
    settings = ServeSettings(model=str(kodalle_run / "model"), num_slots=2, max_queued_sequences=4, page=False)
    pool = LocalPool(settings)
    try:
        with serving(build_api(pool, settings)) as port, ThreadPoolExecutor(12) as threads:
            body = {"prompt": PROMPT, "candidates": 2}
            replies = list(threads.map(lambda _: post_json(port, GENERATE, body), range(12)))
    finally:
        pool.close()
    assert {reply.status for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status == 429:
            assert reply.error["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) >= 1
