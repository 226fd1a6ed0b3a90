"""Captions to ranked images: the same image whatever else is generated, and what `kodalle generate` writes."""

import copy
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from engine.decoding.sampler import Sampler
from engine.device import pick_device
from engine.errors import InputError
from engine.models.folder import Part, read_part, write_model_folder
from engine.pipeline.generation import Candidate, Generation
from engine.pipeline.image_files import to_uint8
from engine.pipeline.init_image import InitImage
from engine.pipeline.likelihood import log_likelihoods
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.conftest import GROUND

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]
LONG = "빨강 바탕에 파랑 네모 " * 6


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


@pytest.fixture(scope="module")
def sixteen(pipeline: Pipeline) -> Generation:
    return pipeline(CAPTIONS[:1], candidates=16, seed=5)[0]


def _by_number(generation: Generation) -> list[Candidate]:
    return sorted(generation.candidates, key=lambda one: one.candidate)


def _same(one: Candidate, other: Candidate) -> None:
    assert (one.candidate, one.seed, one.image_tokens) == (other.candidate, other.seed, other.image_tokens)
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert one.score == pytest.approx(other.score, abs=1e-6)


def test_a_generation_holds_ranked_distinct_candidates(pipeline: Pipeline, sixteen: Generation) -> None:
    assert sixteen.caption == CAPTIONS[0]
    assert sixteen.tokens_cut == 0
    assert [one.rank for one in sixteen.candidates] == list(range(1, 17))
    assert [one.candidate for one in _by_number(sixteen)] == list(range(16))
    scores = [one.score for one in sixteen.candidates]
    assert None not in scores
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert all(one.image.size == (32, 32) and len(one.image_tokens) == 64 for one in sixteen.candidates)
    assert len({one.image_tokens for one in sixteen.candidates}) == 16
    assert sixteen.top(3) == sixteen.candidates[:3]
    assert sixteen.timings_s.keys() == {"prefill", "decode", "vqgan", "ranking"}


def test_same_seed_same_images_another_seed_others(pipeline: Pipeline, sixteen: Generation) -> None:
    again = pipeline(CAPTIONS[:1], candidates=16, seed=5)[0]
    for one, other in zip(sixteen.candidates, again.candidates, strict=True):
        _same(one, other)
    another = pipeline(CAPTIONS[:1], candidates=1, seed=6)[0]
    assert another.candidates[0].image_tokens not in {one.image_tokens for one in sixteen.candidates}


@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_candidate_is_the_same_however_many_there_are(pipeline: Pipeline, sixteen: Generation, candidates: int) -> None:
    few = pipeline(CAPTIONS[:1], candidates=candidates, seed=5)[0]
    for one, other in zip(_by_number(few), _by_number(sixteen), strict=False):
        _same(one, other)


def test_captions_together_equal_captions_apart(pipeline: Pipeline) -> None:
    options = SamplingParams(temperature=0.9, top_k=20, guidance_scale=2.0)
    together = pipeline(CAPTIONS, candidates=3, seed=1, sampling_params=options)
    for caption, generation in zip(CAPTIONS, together, strict=True):
        alone = pipeline([caption], candidates=3, seed=1, sampling_params=options)[0]
        assert (generation.caption, generation.tokens_cut) == (alone.caption, alone.tokens_cut)
        for one, other in zip(_by_number(generation), _by_number(alone), strict=True):
            _same(one, other)


def test_global_generator_is_neither_read_nor_moved(pipeline: Pipeline, sixteen: Generation) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    generation = pipeline(CAPTIONS[:1], candidates=2, seed=5)[0]
    assert torch.equal(torch.get_rng_state(), state)
    _same(_by_number(generation)[1], _by_number(sixteen)[1])


def test_saved_and_loaded_generates_the_same(pipeline: Pipeline, sixteen: Generation, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    loaded = Pipeline.from_pretrained(str(tmp_path / "copy"))
    generation = loaded(CAPTIONS[:1], candidates=16, seed=5)[0]
    for one, other in zip(generation.candidates, sixteen.candidates, strict=True):
        _same(one, other)
    assert pipeline.ground == loaded.ground == GROUND
    loaded.save_pretrained(tmp_path / "copy")  # over itself, the card kept
    assert "# KoDALLE" in (tmp_path / "copy" / "model_card.md").read_text(encoding="utf-8")
    loaded.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "transformer.safetensors").stat().st_size for name in ("half", "copy")]
    assert sizes[0] < 0.6 * sizes[1]
    assert Pipeline.from_pretrained(tmp_path / "half")(CAPTIONS[:1], candidates=1)[0].candidates


def test_runs_in_bf16(kodalle_run: Path) -> None:
    low = Pipeline.from_pretrained(kodalle_run / "model", dtype=torch.bfloat16)
    generation = low(CAPTIONS, candidates=2)[1]
    assert all(one.score is not None and np.isfinite(one.score) for one in generation.candidates)


def test_ranking_is_koclips(pipeline: Pipeline, sixteen: Generation) -> None:
    assert pipeline.koclip is not None
    tokens = pipeline.tokenizer.encode(CAPTIONS[:1], pipeline.koclip.config.text_seq_len).tokens
    ordered = _by_number(sixteen)
    images = pipeline.decode_images(torch.tensor([one.image_tokens for one in ordered]))
    expected = pipeline.koclip.similarity(images, tokens)[0]
    assert torch.allclose(torch.tensor([one.score for one in ordered]), expected, atol=1e-5)


def test_without_a_ranker_the_order_is_that_of_the_candidates(
    kodalle_run: Path, sixteen: Generation, tmp_path: Path
) -> None:
    source = kodalle_run / "model"
    whole = Pipeline.from_pretrained(source)
    write_model_folder(
        tmp_path / "m",
        {"vqgan": read_part(source, "vqgan"), "transformer": read_part(source, "transformer")},
        card="",
        tokenizer=whole.tokenizer,
    )
    generation = Pipeline.from_pretrained(tmp_path / "m")(CAPTIONS[:1], candidates=4, seed=5)[0]
    assert [(one.candidate, one.rank, one.score) for one in generation.candidates] == [
        (n, n + 1, None) for n in range(4)
    ]
    for one, other in zip(generation.candidates, _by_number(sixteen), strict=False):
        assert one.image_tokens == other.image_tokens


def test_caption_too_long(pipeline: Pipeline) -> None:
    whole = int((pipeline.tokenizer.encode([LONG], 200).tokens != 1).sum())
    generation = pipeline([LONG, CAPTIONS[0]], candidates=1)
    assert [one.tokens_cut for one in generation] == [whole - 12, 0]
    with pytest.raises(InputError, match=rf"is {whole} tokens, {whole - 12} more than the model's 12"):
        pipeline([LONG], candidates=1, strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": []}, "give a caption"),
        ({"captions": ["a", "  "]}, "give a caption"),
        ({"captions": "빨강"}, "captions: .*give a list of strings"),
        ({"candidates": 1.5}, "candidates: 1.5: must be a whole number"),
        ({"seed": "7"}, "seed: '7': must be a whole number"),
        ({"candidates": 0}, "candidates: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed: "),
    ],
)
def test_bad_requests(pipeline: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(**({"captions": CAPTIONS, "candidates": 1} | arguments))  # type: ignore[arg-type]


def test_positions_are_reported(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(CAPTIONS[:1], candidates=1, on_position=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 64) for number in range(1, 65)]


def test_parts_of_two_models_are_refused(kodalle_run: Path, tmp_path: Path) -> None:
    source = kodalle_run / "model"
    transformer = read_part(source, "transformer")
    config = transformer.config.model_copy(update={"image_vocab_size": 31})
    cut = {name: value[:-1] if name in ("head.weight", "head.bias", "image_embedding.tokens") else value
           for name, value in transformer.weights.items()}  # fmt: skip
    parts = {"vqgan": read_part(source, "vqgan"), "transformer": Part(config, cut)}
    write_model_folder(tmp_path / "m", parts, card="")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"transformer has 8x8 of 31 tokens.*codec 8x8 of 32"):
        Pipeline.from_pretrained(tmp_path / "m")


def test_folder_of_a_codec_alone_is_refused(vqgan_run: Path) -> None:
    with pytest.raises(InputError, match=r"has no transformer \(it holds: vqgan\)"):
        Pipeline.from_pretrained(vqgan_run / "model")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "one/two/three"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Pipeline.from_pretrained(name)


def test_unreachable_hub_name() -> None:
    with pytest.raises(
        InputError, match="model: owner/nothing: no such folder, and it cannot be fetched from the hub"
    ) as caught:
        Pipeline.from_pretrained("owner/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ init images


def _photo() -> Image.Image:
    """32 x 32, as the model's images: nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels[8:24, 8:24] = (40, 60, 220)
    return Image.fromarray(pixels)


def _hole() -> Image.Image:
    """Cells 2 to 4 across and 2 to 5 down, of 8 x 8 cells of 4 pixels; the last column and row marked in part."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:21, 8:18] = 255
    return Image.fromarray(mask)


def _encoded(pipeline: Pipeline, photo: Image.Image) -> torch.Tensor:
    """(64,)."""
    return pipeline.vqgan.encode(torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255)[0]


@pytest.mark.parametrize("init_image", [InitImage(_photo(), keep_rows=3), InitImage(_photo(), mask_image=_hole())])
def test_init_tokens_are_kept_and_the_rest_is_the_samplers(pipeline: Pipeline, init_image: InitImage) -> None:
    generation = pipeline(CAPTIONS[:1], candidates=5, seed=5, init_image=init_image)[0]
    regenerated = torch.from_numpy(init_image.regenerated_tokens(32, 8))
    assert regenerated.sum() == (40 if init_image.mask_image is None else 12)
    tokens = _encoded(pipeline, init_image.image).masked_fill(regenerated, -1)
    assert generation.init_tokens == tuple(tokens.tolist())
    sampled = torch.tensor([one.image_tokens for one in _by_number(generation)])
    assert torch.equal(sampled[:, ~regenerated], tokens[~regenerated].expand(5, -1))
    assert len({tuple(row) for row in sampled[:, regenerated].tolist()}) == 5
    text = pipeline.tokenizer.encode(CAPTIONS[:1], 12).tokens
    requests = [SequenceRequest(0, SamplingParams(seed=5), candidate=number) for number in range(5)]
    assert torch.equal(
        Sampler(pipeline.transformer).generate(text, requests, init_tokens=tokens.expand(5, -1)), sampled
    )


@pytest.mark.parametrize("candidates", [1, 3])  # one is decoded with several tokens a step
def test_strength_0_keeps_every_token_and_1_keeps_none(pipeline: Pipeline, candidates: int) -> None:
    kept = pipeline(CAPTIONS[:1], candidates=candidates, seed=5, init_image=InitImage(_photo(), strength=0))[0]
    assert all(torch.equal(torch.tensor(one.image_tokens), _encoded(pipeline, _photo())) for one in kept.candidates)
    anew = pipeline(CAPTIONS[:1], candidates=candidates, seed=5, init_image=InitImage(_photo(), strength=1))[0]
    free = pipeline(CAPTIONS[:1], candidates=candidates, seed=5)[0]
    assert [one.image_tokens for one in _by_number(anew)] == [one.image_tokens for one in _by_number(free)]


def test_strength_is_chosen_for_each_caption_and_keeps_what_a_higher_one_keeps(pipeline: Pipeline) -> None:
    def sampled(caption: str, strength: float) -> torch.Tensor:
        request = pipeline.prepare([caption], init_image=InitImage(_photo(), strength=strength))[0]
        assert request.init_tokens is not None
        assert (
            request.init_tokens[request.init_tokens >= 0] == _encoded(pipeline, _photo())[request.init_tokens >= 0]
        ).all()
        return request.init_tokens < 0

    low, high = sampled(CAPTIONS[0], 0.25), sampled(CAPTIONS[0], 0.5)
    assert (int(low.sum()), int(high.sum())) == (16, 32)
    assert not (low & ~high).any()
    both = pipeline.prepare(CAPTIONS[:2], init_image=InitImage(_photo(), strength=0.25))
    assert [bool((one.init_tokens < 0).equal(sampled(one.caption, 0.25))) for one in both] == [True, True]  # type: ignore[union-attr, operator]


def test_a_changed_word_keeps_what_it_does_not_touch_and_is_on_record(pipeline: Pipeline) -> None:
    init_image = InitImage(_photo(), changed_from=CAPTIONS[1])
    request = pipeline.prepare(CAPTIONS[:1], init_image=init_image)[0]
    same = pipeline.prepare(CAPTIONS[1:2], init_image=init_image)[0]
    assert request.init_tokens is not None
    assert same.init_tokens is not None
    assert (same.init_tokens >= 0).all()  # the same caption touches nothing
    record = pipeline.provenance(request, 0)["init_image"]
    assert (record["changed_from"], record["strength"], record["keep_rows"]) == (CAPTIONS[1], None, None)
    assert record["paste"] is False


def test_pasted_pixels_are_the_originals_bit_by_bit(pipeline: Pipeline) -> None:
    photo, marked = np.asarray(_photo()), np.asarray(_hole()) > 0
    pasted = pipeline(CAPTIONS[:1], candidates=3, init_image=InitImage(_photo(), mask_image=_hole()))[0]
    plain = pipeline(CAPTIONS[:1], candidates=3, init_image=InitImage(_photo(), mask_image=_hole(), paste=False))[0]
    for one, other in zip(_by_number(pasted), _by_number(plain), strict=True):
        assert one.image_tokens == other.image_tokens
        image, decoded = np.asarray(one.image), np.asarray(other.image)
        assert np.array_equal(image[~marked], photo[~marked])
        assert np.array_equal(image[marked], decoded[marked])
        tokens = torch.tensor([other.image_tokens])
        assert np.array_equal(decoded, to_uint8(pipeline.decode_images(tokens))[0].numpy())
    assert pipeline.koclip is not None  # the ranking is of the images as they come out
    images = torch.stack(
        [torch.from_numpy(np.asarray(one.image).copy()).permute(2, 0, 1) / 255 for one in pasted.top(3)]
    )
    scores = pipeline.rank_scores(CAPTIONS[:1], images[None])
    assert scores is not None
    assert scores[0].tolist() == pytest.approx([one.score for one in pasted.top(3)], abs=2e-3)  # 8 bits a pixel
    rows = pipeline(CAPTIONS[:1], candidates=1, init_image=InitImage(_photo(), keep_rows=3))[0].candidates[0]
    assert np.array_equal(np.asarray(rows.image)[:12], photo[:12])


def test_inpainted_candidate_is_the_same_alone_and_among_others(pipeline: Pipeline) -> None:
    init_image = InitImage(_photo(), mask_image=_hole())
    options = SamplingParams(temperature=0.9, guidance_scale=2.0)
    many = pipeline(
        CAPTIONS, candidates=3, seed=3, sampling_params=options, init_image=init_image, rank_by="log_likelihood"
    )
    for caption, generation in zip(CAPTIONS, many, strict=True):
        few = pipeline(
            [caption], candidates=1, seed=3, sampling_params=options, init_image=init_image, rank_by="log_likelihood"
        )[0]
        for one, other in zip(_by_number(few), _by_number(generation), strict=False):
            _same(one, other)
            assert one.log_likelihood == other.log_likelihood


def test_ranked_by_log_likelihood(pipeline: Pipeline) -> None:
    init_image = InitImage(_photo(), mask_image=_hole())
    generation = pipeline(CAPTIONS[:1], candidates=8, init_image=init_image, rank_by="log_likelihood")[0]
    likelihoods = [one.log_likelihood for one in generation.candidates]
    assert likelihoods == sorted(likelihoods, reverse=True)  # type: ignore[type-var]
    assert len(set(likelihoods)) > 1
    tokens = torch.tensor([one.image_tokens for one in generation.candidates])
    text = pipeline.tokenizer.encode(CAPTIONS[:1], 12).tokens
    regenerated = torch.tensor(generation.init_tokens) < 0
    assert likelihoods == log_likelihoods(pipeline.transformer, text, tokens, regenerated).tolist()
    by_koclip = pipeline(CAPTIONS[:1], candidates=8, init_image=init_image)[0]
    assert {one.log_likelihood for one in by_koclip.candidates} == {None}
    for one, other in zip(_by_number(by_koclip), _by_number(generation), strict=True):
        _same(one, other)


@pytest.mark.parametrize(
    ("init_image", "rank_by", "message"),
    [
        (InitImage(_photo(), keep_rows=8), "koclip", "keep_rows: 8: this model's images have 8 rows"),
        (None, "log_likelihood", "rank_by: log_likelihood: needs a mask"),
        (InitImage(_photo(), keep_rows=4), "log_likelihood", "rank_by: log_likelihood: needs a mask"),
        (None, "beauty", "rank_by: beauty: write one of koclip, log_likelihood"),
    ],
)
def test_bad_init_images(pipeline: Pipeline, init_image: InitImage | None, rank_by: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(CAPTIONS[:1], candidates=1, init_image=init_image, rank_by=rank_by)  # type: ignore[arg-type]


def test_captions_are_continued(pipeline: Pipeline) -> None:
    lines = pipeline.continue_caption("빨강 바탕에", count=3, seed=1)
    assert len(lines) == 3
    assert all(line.text.startswith("빨강 바탕에") for line in lines)
    assert pipeline.continue_caption("빨강 바탕에", count=1, seed=1) == lines[:1]


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:77", "meta", "cpu:x"):
        with pytest.raises(InputError, match=f"--device: {name}"):
            pick_device(name)


def test_captions_that_look_alike_are_one_with_any_tokenizer(pipeline: Pipeline) -> None:
    rules = json.loads(pipeline.tokenizer.to_json())
    rules["normalizer"] = None  # as tokenizers of other projects have it
    plain = copy.copy(pipeline)
    plain.tokenizer = pipeline.tokenizer.with_backend(Tokenizer.from_str(json.dumps(rules)))
    expected = plain(CAPTIONS[:1], candidates=1, seed=5)[0]
    for caption in (
        unicodedata.normalize("NFD", CAPTIONS[0]),
        "\ufeff" + CAPTIONS[0],
        CAPTIONS[0].replace(" ", " \u200b\t").replace("바", "바\u00ad"),
    ):
        found = plain([caption], candidates=1, seed=5)[0]
        assert found.caption == CAPTIONS[0]
        _same(found.candidates[0], expected.candidates[0])
        assert plain.provenance(found.request, 0)["caption"] == CAPTIONS[0]
        images = torch.zeros(1, 1, 3, 32, 32)
        scores = plain.rank_scores([caption], images), plain.rank_scores(CAPTIONS[:1], images)
        assert torch.equal(*scores)  # type: ignore[arg-type]
        assert plain.continue_caption(caption, count=1) == plain.continue_caption(CAPTIONS[0], count=1)
    with pytest.raises(InputError, match=r"caption: .*control character U.0000"):
        plain(["빨강\0"])
    with pytest.raises(InputError, match=r"caption: .*not empty"):
        plain(["\u200b\u3164"])
