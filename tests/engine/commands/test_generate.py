"""`kodalle generate` with a given picture and `kodalle continue`: files in, files and lines out, and what is refused."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import cli
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

CAPTION = "빨강 바탕에 파랑 네모"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A photo wider than high, masks for it, and files that are no pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "사진.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:25, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "white.png")
    Image.new("L", (60, 40), 0).save(tmp_path / "black.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "square.png")
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "사진.png").read_bytes()[:2000])
    return tmp_path


def _kodalle(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["kodalle", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--keep-rows", "3"], {"keep_rows": 3, "mask": None, "mask_sha256": None, "paste": True}),
        ([], {"keep_rows": None, "mask": None, "mask_sha256": None, "paste": True}),
        (
            ["--mask", "mask.png", "--no-paste", "--rank-by", "fit"],
            {"keep_rows": None, "mask": "mask.png", "paste": False},
        ),
    ],
)
def test_draw_from_a_picture(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], given: dict[str, object]
) -> None:
    model = kodalle_run / "model"
    draw = ["generate", str(model), CAPTION, "--candidates", "3", "--top", "2", "--seed", "7", "--device", "cpu"]
    assert _kodalle(monkeypatch, files, *draw, "--image", "사진.png", *options) == 0
    result = json.loads((files / "generations" / "result.json").read_text(encoding="utf-8"))
    digests = {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in ("사진.png", "mask.png")}
    expected = {"image": "사진.png", "image_sha256": digests["사진.png"], **given}
    if expected["mask"]:
        expected["mask_sha256"] = digests["mask.png"]
    assert result["init_image"] == expected
    assert result["rank_by"] == ("fit" if "fit" in options else "koclip")
    with Image.open(files / "사진.png") as photo, Image.open(files / "mask.png") as mask:
        again = InitImage(
            photo,
            keep_rows=expected["keep_rows"],
            mask_image=mask if expected["mask"] else None,
            paste=expected["paste"],
        )  # type: ignore[arg-type]
        generation = Pipeline.from_pretrained(model)(
            [CAPTION], candidates=3, seed=7, init_image=again, rank_by=result["rank_by"]
        )[0]
    assert generation.init_tokens is not None
    assert result["tokens_given"] == sum(token >= 0 for token in generation.init_tokens) > 0
    for one, told in zip(generation.candidates, result["candidates"], strict=True):
        assert (told["candidate"], told["fit"]) == (one.candidate, one.fit)
        if told["file"]:
            with Image.open(files / "generations" / told["file"]) as picture:
                assert np.array_equal(np.asarray(picture), np.asarray(one.image))
                assert json.loads(picture.text["init_image"]) == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "text.png"], "image: text.png: is not a JPEG, PNG, WEBP image"),
        (["--image", "empty.png"], "image: empty.png: the file is empty"),
        (["--image", "cut.png"], "image: cut.png: is truncated or damaged"),
        (["--image", "사진.png", "--mask", "nowhere.png"], "image: nowhere.png: no such file"),
        (["--image", "사진.png", "--mask", "square.png"], "mask_image: 40 x 40: must be as large as the picture"),
        (["--image", "사진.png", "--mask", "black.png"], "mask_image: all black: marks nothing"),
        (["--image", "사진.png", "--mask", "white.png"], "mask_image: all white: keeps nothing"),
        (["--image", "사진.png", "--mask", "clear.png"], "mask_image: has transparent pixels"),
        (["--image", "사진.png", "--mask", "mask.png", "--keep-rows", "2"], "keep_rows: 2: goes with no mask"),
        (["--image", "사진.png", "--keep-rows", "0"], "keep_rows: 0: must be 1 or more"),
        (["--image", "사진.png", "--keep-rows", "3", "--rank-by", "fit"], "--rank-by: fit: is for inpainting"),
    ],
)
def test_bad_pictures_are_one_line_before_the_model_is_read(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert _kodalle(monkeypatch, files, "generate", "missing-model", CAPTION, "--device", "cpu", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not (files / "generations").exists()


def test_too_many_rows_for_the_model(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image", "사진.png", "--keep-rows", "8", "--device", "cpu"]
    assert _kodalle(monkeypatch, files, "generate", str(kodalle_run / "model"), CAPTION, *options) == 2
    assert "error: keep_rows: 8: this model's pictures have 8 rows of tokens" in capsys.readouterr().err
    assert not (files / "generations").exists()


def test_continue_prints_one_caption_a_line(
    kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, beginning = kodalle_run / "model", "빨강 바탕에"
    options = ["--count", "5", "--seed", "7", "--top-k", "30", "--device", "cpu"]
    assert _kodalle(monkeypatch, tmp_path, "continue", str(model), beginning, *options) == 0
    answer = capsys.readouterr()
    assert _kodalle(monkeypatch, tmp_path, "continue", str(model), beginning, *options) == 0
    assert capsys.readouterr().out == answer.out
    lines = Pipeline.from_pretrained(model).continue_caption(
        beginning, count=5, seed=7, sampling_params=SamplingParams(top_k=30)
    )
    assert answer.out.splitlines() == [line.text for line in lines]
    notes = [line for line in answer.err.splitlines() if "has no end" in line]
    assert len(notes) == sum(not line.is_complete for line in lines)


def test_continue_refuses(
    kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["missing", "빨강"], "error: model folder: missing: no such folder"),
        ([str(kodalle_run / "model"), "빨강 " * 20], "error: caption: "),
        (["missing", "빨강", "--top-p", "2"], "error: top_p: 2.0"),
    ):
        assert _kodalle(monkeypatch, tmp_path, "continue", *arguments, "--device", "cpu") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(said)
