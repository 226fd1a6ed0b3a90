"""What `kodalle generate` writes into its folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.commands.generate import generate_to_folder
from engine.errors import InputError
from engine.pipeline.generation import Generation
from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams
from tests.engine.pipeline.test_pipeline import CAPTIONS, LONG, _by_number


@pytest.fixture(scope="module")
def pipeline(kodalle_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(kodalle_run / "model")


@pytest.fixture(scope="module")
def sixteen(pipeline: Pipeline) -> Generation:
    return pipeline(CAPTIONS[:1], candidates=16, seed=5)[0]


def test_a_models_own_sampling_params(
    kodalle_run: Path, pipeline: Pipeline, sixteen: Generation, tmp_path: Path
) -> None:
    """They count one by one where a request states none, and are saved with the model."""
    model = tmp_path / "model"
    shutil.copytree(kodalle_run / "model", model)
    (model / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 9}')
    own = SamplingParams(temperature=0.5, top_k=9)
    expected = [
        one.image_tokens for one in _by_number(pipeline(CAPTIONS[:1], candidates=5, seed=5, sampling_params=own)[0])
    ]
    assert expected != [one.image_tokens for one in _by_number(sixteen)[:5]]
    Pipeline.from_pretrained(model).save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved")
    assert again.default_sampling_params == own
    sampled = [one.image_tokens for one in _by_number(again(CAPTIONS[:1], candidates=5, seed=5)[0])]
    assert sampled == expected
    by_command = _generate(model, tmp_path / "out", temperature=None, top_k=None)
    assert [one.image_tokens for one in _by_number(by_command)] == expected
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["candidates"][0]["provenance"]["sampling_params"] == {
        "temperature": 0.5,
        "top_k": 9,
        "top_p": None,
        "guidance_scale": 1.0,
    }
    warmer = _generate(model, tmp_path / "warmer", temperature=1.5)
    assert (
        json.loads((tmp_path / "warmer" / "result.json").read_text())["candidates"][0]["provenance"]["sampling_params"][
            "top_k"
        ]
        == 9
    )
    assert [one.image_tokens for one in _by_number(warmer)] != expected


def _generate(
    model: Path, out: Path, caption: str = CAPTIONS[0], *, strict: bool = False, **params: float | None
) -> Generation:
    values = {"candidates": 5, "top": 2, "seed": 5} | params
    return generate_to_folder(str(model), caption, out, sampling_params=values, strict=strict, device="cpu")


def test_a_folder_that_is_written_again_holds_the_new_generation_alone(kodalle_run: Path, tmp_path: Path) -> None:
    _generate(kodalle_run / "model", tmp_path)
    ours = {path.name for path in tmp_path.glob("*-seed5-*.png")}
    assert len(ours) == 2
    (tmp_path / "my own.png").write_bytes(b"precious")
    (tmp_path / "01-seed5-candidate000.png.bak").write_bytes(b"precious")
    _generate(kodalle_run / "model", tmp_path, seed=6)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & ours
    assert names >= {"my own.png", "01-seed5-candidate000.png.bak", "sheet.png", "result.json"}
    assert len([name for name in names if "-seed6-" in name]) == 2
    # A result.json that names others than ours removes nothing.
    for text in ('{"candidates": [{"file": "my own.png"}, {"file": "../x.png"}, {"file": null}]}', "[", "[1]", "{}"):
        (tmp_path / "result.json").write_text(text)
        _generate(kodalle_run / "model", tmp_path, seed=6)
    assert (tmp_path / "my own.png").read_bytes() == b"precious"


def test_generate_writes_images_sheet_and_result(
    kodalle_run: Path, sixteen: Generation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "그림" / "one"
    generation = _generate(kodalle_run / "model", out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    files = [one["file"] for one in result["candidates"] if one["file"]]
    assert {path.name for path in out.iterdir()} == {*files, "sheet.png", "result.json"}
    assert len(files) == 2
    assert (result["caption"], result["tokens_cut"]) == (CAPTIONS[0], 0)
    assert [one["rank"] for one in result["candidates"]] == [1, 2, 3, 4, 5]
    assert result["timings_s"].keys() == {"loading", "prefill", "decode", "vqgan", "ranking", "encoding"}
    assert result["candidates"][0]["provenance"]["sampling_params"] == {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "guidance_scale": 1.0,
    }
    for one, file in zip(generation.top(2), files, strict=True):
        with Image.open(out / file) as image:
            assert np.array_equal(np.asarray(image), np.asarray(_by_number(sixteen)[one.candidate].image))
        provenance = result["candidates"][one.rank - 1]["provenance"]
        assert read_metadata((out / file).read_bytes()) == provenance
        assert (provenance["seed"], provenance["candidate"]) == (5, one.candidate)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 5 * (128 + 4) + 4  # five in a row, 32 pixels enlarged to 128
    message = capsys.readouterr().out
    assert all(str(out / file) in message for file in files)


def test_generate_again_over_the_same_folder(
    kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generate(kodalle_run / "model", tmp_path)
    monkeypatch.setattr("engine.pipeline.image_files.contact_sheet", lambda *_, **__: os.abort)
    with pytest.raises(AttributeError):  # dies before it is done: an old result.json would describe a mixture
        _generate(kodalle_run / "model", tmp_path, seed=6)
    assert not (tmp_path / "result.json").exists()


def test_generate_reports_what_was_cut(kodalle_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation = _generate(kodalle_run / "model", tmp_path, LONG)
    assert f"note: the caption is {generation.tokens_cut} tokens too long" in capsys.readouterr().out
    with pytest.raises(InputError, match="more than the model's 12"):
        _generate(kodalle_run / "model", tmp_path / "strict", LONG, strict=True)
    assert not (tmp_path / "strict").exists()


def test_generate_refuses_before_it_loads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="top: 6: is more than the 5 candidates"):
        _generate(tmp_path / "nowhere", tmp_path / "out", top=6)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: .*is a file"):
        _generate(tmp_path / "nowhere", tmp_path / "file")
