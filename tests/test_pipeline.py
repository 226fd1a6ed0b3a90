"""Captions to ranked pictures: the same picture whatever else is drawn, and what `kodalle draw` writes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import InputError
from engine.models.folder import Part, read_part, write_model_folder
from engine.sampling.command import draw_to_folder, pick_device
from engine.sampling.options import SamplingOptions
from engine.sampling.pipeline import Candidate, Drawing, Pipeline

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]
LONG = "빨강 바탕에 파랑 네모 " * 6


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


@pytest.fixture(scope="module")
def sixteen(pipeline: Pipeline) -> Drawing:
    return pipeline(CAPTIONS[:1], candidates=16, seed=5)[0]


def _by_number(drawing: Drawing) -> list[Candidate]:
    return sorted(drawing.candidates, key=lambda one: one.candidate)


def _same(one: Candidate, other: Candidate) -> None:
    assert (one.candidate, one.seed, one.image_tokens) == (other.candidate, other.seed, other.image_tokens)
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert one.score == pytest.approx(other.score, abs=1e-6)


def test_what_comes_out(pipeline: Pipeline, sixteen: Drawing) -> None:
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


def test_same_seed_same_pictures_another_seed_others(pipeline: Pipeline, sixteen: Drawing) -> None:
    again = pipeline(CAPTIONS[:1], candidates=16, seed=5)[0]
    for one, other in zip(sixteen.candidates, again.candidates, strict=True):
        _same(one, other)
    other = pipeline(CAPTIONS[:1], candidates=1, seed=6)[0]
    assert other.candidates[0].image_tokens not in {one.image_tokens for one in sixteen.candidates}


@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_candidate_is_the_same_however_many_are_asked(pipeline: Pipeline, sixteen: Drawing, candidates: int) -> None:
    few = pipeline(CAPTIONS[:1], candidates=candidates, seed=5)[0]
    for one, other in zip(_by_number(few), _by_number(sixteen), strict=False):
        _same(one, other)


def test_captions_together_equal_captions_apart(pipeline: Pipeline) -> None:
    options = SamplingOptions(temperature=0.9, top_k=20, guidance_scale=2.0)
    together = pipeline(CAPTIONS, candidates=3, seed=1, options=options)
    for caption, drawing in zip(CAPTIONS, together, strict=True):
        alone = pipeline([caption], candidates=3, seed=1, options=options)[0]
        assert (drawing.caption, drawing.tokens_cut) == (alone.caption, alone.tokens_cut)
        for one, other in zip(_by_number(drawing), _by_number(alone), strict=True):
            _same(one, other)


def test_global_generator_is_neither_read_nor_moved(pipeline: Pipeline, sixteen: Drawing) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    drawing = pipeline(CAPTIONS[:1], candidates=2, seed=5)[0]
    assert torch.equal(torch.get_rng_state(), state)
    _same(_by_number(drawing)[1], _by_number(sixteen)[1])


def test_saved_and_loaded_draws_the_same(pipeline: Pipeline, sixteen: Drawing, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    loaded = Pipeline.from_pretrained(str(tmp_path / "copy"))
    drawing = loaded(CAPTIONS[:1], candidates=16, seed=5)[0]
    for one, other in zip(drawing.candidates, sixteen.candidates, strict=True):
        _same(one, other)
    loaded.save_pretrained(tmp_path / "copy")  # over itself, the card kept
    assert "# KoDALLE" in (tmp_path / "copy" / "model_card.md").read_text(encoding="utf-8")
    loaded.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "transformer.safetensors").stat().st_size for name in ("half", "copy")]
    assert sizes[0] < 0.6 * sizes[1]
    assert Pipeline.from_pretrained(tmp_path / "half")(CAPTIONS[:1], candidates=1)[0].candidates


def test_runs_in_bf16(kodalle_run: Path) -> None:
    low = Pipeline.from_pretrained(kodalle_run / "model", dtype=torch.bfloat16)
    drawing = low(CAPTIONS, candidates=2)[1]
    assert all(one.score is not None and np.isfinite(one.score) for one in drawing.candidates)


def test_ranking_is_koclips(pipeline: Pipeline, sixteen: Drawing) -> None:
    assert pipeline.koclip is not None
    tokens = pipeline.tokenizer.encode(CAPTIONS[:1], pipeline.koclip.config.text_seq_len).tokens
    ordered = _by_number(sixteen)
    images = pipeline.decode_images(torch.tensor([one.image_tokens for one in ordered]))
    expected = pipeline.koclip.similarity(images, tokens)[0]
    assert torch.allclose(torch.tensor([one.score for one in ordered]), expected, atol=1e-5)


def test_without_a_ranker_the_order_is_the_order_drawn(kodalle_run: Path, sixteen: Drawing, tmp_path: Path) -> None:
    source = kodalle_run / "model"
    whole = Pipeline.from_pretrained(source)
    write_model_folder(
        tmp_path / "m",
        {"vqgan": read_part(source, "vqgan"), "transformer": read_part(source, "transformer")},
        card="",
        tokenizer=whole.tokenizer,
    )
    drawing = Pipeline.from_pretrained(tmp_path / "m")(CAPTIONS[:1], candidates=4, seed=5)[0]
    assert [(one.candidate, one.rank, one.score) for one in drawing.candidates] == [(n, n + 1, None) for n in range(4)]
    for one, other in zip(drawing.candidates, _by_number(sixteen), strict=False):
        assert one.image_tokens == other.image_tokens


def test_caption_too_long(pipeline: Pipeline) -> None:
    whole = int((pipeline.tokenizer.encode([LONG], 200).tokens != 1).sum())
    drawing = pipeline([LONG, CAPTIONS[0]], candidates=1)
    assert [one.tokens_cut for one in drawing] == [whole - 12, 0]
    with pytest.raises(InputError, match=rf"is {whole} tokens, {whole - 12} more than the model's 12"):
        pipeline([LONG], candidates=1, strict=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"captions": []}, "give a caption"),
        ({"captions": ["a", "  "]}, "give a caption"),
        ({"captions": "빨강"}, "give a list of captions"),
        ({"candidates": 0}, "candidates: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed: "),
    ],
)
def test_bad_requests(pipeline: Pipeline, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        pipeline(**({"captions": CAPTIONS, "candidates": 1} | arguments))  # type: ignore[arg-type]


def test_progress_counts_image_tokens(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(CAPTIONS[:1], candidates=1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 64) for number in range(1, 65)]


def test_parts_of_two_models_are_refused(kodalle_run: Path, tmp_path: Path) -> None:
    source = kodalle_run / "model"
    transformer = read_part(source, "transformer")
    config = transformer.config.model_copy(update={"image_vocab_size": 31})
    cut = {name: value[:-1] if name in ("head.weight", "head.bias", "image_embedding.tokens") else value
           for name, value in transformer.weights.items()}  # fmt: skip
    parts = {"vqgan": read_part(source, "vqgan"), "transformer": Part(config, cut)}
    write_model_folder(tmp_path / "m", parts, card="")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"transformer draws 8x8 of 31 tokens.*reads 8x8 of 32"):
        Pipeline.from_pretrained(tmp_path / "m")


def test_folder_of_a_codec_alone_is_refused(vqgan_run: Path) -> None:
    with pytest.raises(InputError, match=r"has no transformer \(it holds: vqgan\)"):
        Pipeline.from_pretrained(vqgan_run / "model")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "one/two/three"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Pipeline.from_pretrained(name)


def test_unreachable_hub_name() -> None:
    with pytest.raises(InputError, match="model: nobody/nothing: no such folder, and the hub gave nothing") as caught:
        Pipeline.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ kodalle draw


def _draw(model: Path, out: Path, caption: str = CAPTIONS[0], **more: object) -> Drawing:
    settings = {"candidates": 5, "top": 2, "seed": 5, "options": SamplingOptions(), "strict": False, "device": "cpu"}
    return draw_to_folder(str(model), caption, out, **(settings | more))  # type: ignore[arg-type]


def test_draw_writes_pictures_sheet_and_result(
    kodalle_run: Path, sixteen: Drawing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "그림" / "one"
    drawing = _draw(kodalle_run / "model", out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    files = [one["file"] for one in result["candidates"] if one["file"]]
    assert {path.name for path in out.iterdir()} == {*files, "sheet.png", "result.json"}
    assert len(files) == 2
    assert (result["caption"], result["tokens_cut"]) == (CAPTIONS[0], 0)
    assert [one["rank"] for one in result["candidates"]] == [1, 2, 3, 4, 5]
    assert result["timings_s"].keys() == {"loading", "prefill", "decode", "vqgan", "ranking", "encoding"}
    assert result["options"] == {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    for one, file in zip(drawing.top(2), files, strict=True):
        with Image.open(out / file) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(_by_number(sixteen)[one.candidate].image))
            text = picture.text  # type: ignore[attr-defined]
        assert text["caption"] == CAPTIONS[0]
        told = {name: json.loads(text[name]) for name in ("seed", "candidate", "rank", "score")}
        assert told == {"seed": 5, "candidate": one.candidate, "rank": one.rank, "score": one.score}
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 5 * (128 + 4) + 4  # five in a row, 32 pixels enlarged to 128
    said = capsys.readouterr().out
    assert all(str(out / file) in said for file in files)


def test_draw_again_over_the_same_folder(kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(kodalle_run / "model", tmp_path)
    monkeypatch.setattr("engine.sampling.command.contact_sheet", lambda *_, **__: os.abort)
    with pytest.raises(AttributeError):  # dies before it is done: an old result.json would tell of a mixture
        _draw(kodalle_run / "model", tmp_path, seed=6)
    assert not (tmp_path / "result.json").exists()


def test_draw_says_what_was_cut(kodalle_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = _draw(kodalle_run / "model", tmp_path, LONG)
    assert f"note: the caption is {drawing.tokens_cut} tokens too long" in capsys.readouterr().out
    with pytest.raises(InputError, match="more than the model's 12"):
        _draw(kodalle_run / "model", tmp_path / "strict", LONG, strict=True)
    assert not (tmp_path / "strict").exists()


def test_draw_refuses_before_it_loads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--top: 6: is more than --candidates 5"):
        _draw(tmp_path / "nowhere", tmp_path / "out", top=6)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: .*is a file"):
        _draw(tmp_path / "nowhere", tmp_path / "file")


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:77", "meta", "cpu:x"):
        with pytest.raises(InputError, match=f"--device: {name}"):
            pick_device(name)
