"""Images larger than the model's own size: as the plain ones where they are as large, alone as in a batch, whole in the codec, ranked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.decoding.sliding_window import TokenGrid
from engine.errors import InputError
from engine.pipeline.image_size import ImageSize, larger_size, parse_size, squares
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.provenance import read_provenance

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]
WIDE = ImageSize(48, 32)


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


def test_wide_images_go_on_from_the_plain_ones(pipeline: Pipeline) -> None:
    plain, wide = (
        sorted(pipeline(CAPTIONS[:1], candidates=3, seed=5, size=size)[0].candidates, key=lambda one: one.candidate)
        for size in (None, WIDE)
    )
    for one, other in zip(plain, wide, strict=True):
        assert other.image.size == (48, 32)
        tokens = torch.tensor(other.image_tokens).view(8, 12)
        assert tuple(tokens[:, :8].flatten().tolist()) == one.image_tokens
        whole = pipeline.decode_images(tokens.flatten()[None], grid=TokenGrid(8, 12))[0]
        assert np.array_equal(np.asarray(other.image), (whole * 255).round().byte().permute(1, 2, 0).numpy())


def test_the_models_own_size_is_the_plain_generation(pipeline: Pipeline) -> None:
    plain, sized = (pipeline(CAPTIONS, candidates=2, seed=5, size=size) for size in (None, ImageSize(32, 32)))
    for one, other in zip(plain, sized, strict=True):
        assert [(c.image_tokens, c.score) for c in one.candidates] == [
            (c.image_tokens, c.score) for c in other.candidates
        ]
        assert pipeline.provenance(one.request, 0) == pipeline.provenance(other.request, 0)
        assert pipeline.provenance(one.request, 0)["size"] is None


def test_alone_as_in_a_batch_and_with_progress(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    together = pipeline(
        CAPTIONS, candidates=3, seed=1, size=ImageSize(40, 36), on_position=lambda *counts: seen.append(counts)
    )
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    alone = pipeline(CAPTIONS[1:], candidates=1, seed=1, size=ImageSize(40, 36))[0].candidates[0]
    (same,) = (one for one in together[1].candidates if one.candidate == 0)
    assert (same.image_tokens, same.image.tobytes()) == (alone.image_tokens, alone.image.tobytes())
    assert same.score == pytest.approx(alone.score, abs=1e-6)


def test_the_score_is_the_mean_of_squares_that_cover_the_image(pipeline: Pipeline) -> None:
    assert pipeline.koclip is not None
    generation = pipeline(CAPTIONS[:1], candidates=3, seed=5, size=WIDE)[0]
    tokens = pipeline.ranker_tokenizer.encode(CAPTIONS[:1], pipeline.koclip.config.text_seq_len).tokens
    for one in generation.candidates:
        image = pipeline.decode_images(torch.tensor([one.image_tokens]), grid=TokenGrid(8, 12))
        left, right = (pipeline.koclip.similarity(image[..., part], tokens) for part in (slice(32), slice(16, 48)))
        assert one.score == pytest.approx(float(left + right) / 2, abs=1e-5)
    scores = [one.score for one in generation.candidates]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_provenance_states_the_size(pipeline: Pipeline) -> None:
    request = pipeline.prepare(CAPTIONS[:1], size=WIDE)[0]
    tree = pipeline.provenance(request, 0)
    assert tree["size"] == {"width": 48, "height": 32}
    assert read_provenance(tree, source="file").image_size == WIDE
    del tree["size"]  # as files from before there were larger ones
    assert read_provenance(tree, source="file").image_size is None


def test_what_does_not_go_together_is_refused(pipeline: Pipeline, kodalle_run: Path) -> None:
    with pytest.raises(InputError, match="size: 48x32: an init image is of the model's own size"):
        pipeline.prepare(CAPTIONS, size=WIDE, init_image=InitImage(Image.new("RGB", (32, 32))))
    with pytest.raises(InputError, match="size: 30x48: this model generates 32x32"):
        pipeline.prepare(CAPTIONS, size=ImageSize(30, 48))
    small, wide = (pipeline.prepare(CAPTIONS[:1], size=size)[0] for size in (None, WIDE))
    with pytest.raises(ValueError, match="several sizes"):
        pipeline.decode([small, wide])


def test_sizes() -> None:
    assert parse_size("192x128", field="--size") == ImageSize(192, 128)
    for text in ("192", "x", "0x32", "-8x8", "8 x 8", "100000x8", "1e3x8", "８x8"):
        with pytest.raises(InputError, match="write WIDTHxHEIGHT"):
            parse_size(text, field="--size")
    sizes = {None: None, ImageSize(32, 32): None, ImageSize(32, 256): ImageSize(32, 256)}
    for size, expected in sizes.items():
        assert larger_size(size, image_size=32, grid_size=8) == expected
    with pytest.raises(InputError, match="write 256x36"):
        larger_size(ImageSize(255, 35), image_size=32, grid_size=8)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 100), (256, 32), (33, 32)])
def test_squares_cover_an_image(size: tuple[int, int]) -> None:
    width, height = size
    covered = np.zeros((height, width), bool)
    found = list(squares(width, height))
    for rows, columns in found:
        assert covered[rows, columns].shape == (32, 32)
        covered[rows, columns] = True
    assert covered.all()
    assert len(found) == -(-max(size) // 32)
