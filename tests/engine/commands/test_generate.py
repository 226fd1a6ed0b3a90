"""`kodalle generate` with an init image or from an image's metadata, and `kodalle continue`: files in, files and lines out, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine import cli
from engine.pipeline.image_encoding import encode_image, read_metadata, save_png
from engine.pipeline.init_image import InitImage
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams

CAPTION = "빨강 바탕에 파랑 네모"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A photo wider than high, masks for it, and files that are no images."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "사진.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:25, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "white.png")
    Image.new("L", (60, 40), 0).save(tmp_path / "black.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "square.png")
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("no image")
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


def _result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def _pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize(
    ("options", "fields", "rank_by"),
    [
        (["--keep-rows", "3"], {"keep_rows": 3}, "koclip"),
        ([], {}, "koclip"),
        (["--strength", "0.5"], {"strength": 0.5}, "koclip"),
        (
            ["--changed-from", "초록 네모", "--strength", "0.25"],
            {"changed_from": "초록 네모", "strength": 0.25},
            "koclip",
        ),
        (
            ["--mask", "mask.png", "--no-paste", "--rank-by", "log_likelihood"],
            {"mask": Path("mask.png"), "paste": False},
            "log_likelihood",
        ),
    ],
)
def test_generate_from_an_init_image(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], fields: Any, rank_by: Any
) -> None:
    model = kodalle_run / "model"
    command = ["generate", str(model), CAPTION, "--candidates", "3", "--top", "2", "--seed", "7", "--device", "cpu"]
    assert _kodalle(monkeypatch, files, *command, "--image", "사진.png", *options) == 0
    result = _result(files / "generations")
    init_image = InitImage.from_files(Path("사진.png"), **fields)
    pipeline = Pipeline.from_pretrained(model)
    generation = pipeline([CAPTION], candidates=3, seed=7, init_image=init_image, rank_by=rank_by)[0]
    assert generation.init_tokens is not None
    assert result["init_tokens"] == sum(token >= 0 for token in generation.init_tokens) > 0
    for one, stated in zip(generation.candidates, result["candidates"], strict=True):
        assert (stated["candidate"], stated["log_likelihood"]) == (one.candidate, one.log_likelihood)
        assert stated["provenance"] == pipeline.provenance(generation.request, one.candidate)
        assert stated["provenance"]["init_image"] == init_image.record(32, 8)
        assert stated["provenance"]["rank_by"] == rank_by
        if stated["file"]:
            file = files / "generations" / stated["file"]
            assert np.array_equal(_pixels(file), np.asarray(one.image))
            assert read_metadata(file.read_bytes()) == stated["provenance"]


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ([], []),
        (["--temperature", "0.8", "--top-k", "20", "--guidance-scale", "2", "--seed", str(2**64 - 1)], []),
        (["--enlarge", "100", "--transparent"], []),
        (["--image", "사진.png", "--keep-rows", "3"], ["--image", "사진.png"]),
        (
            ["--image", "사진.png", "--mask", "mask.png", "--no-paste", "--rank-by", "log_likelihood"],
            ["--image", "사진.png", "--mask", "mask.png"],
        ),
        (["--image", "사진.png", "--changed-from", "초록", "--strength", "0.5"], ["--image", "사진.png"]),
        (["--size", "48x36"], []),
        (["--refine", "2", "--refine-step-size", "0.5"], []),
    ],
)
def test_an_image_is_made_again_from_its_own_metadata(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], again: list[str]
) -> None:
    """Alone, from a file under another name, the model found by the metadata."""
    model = str(kodalle_run / "model")
    command = ["generate", model, CAPTION, "--candidates", "4", "--top", "4", "--device", "cpu", "--out", "first"]
    assert _kodalle(monkeypatch, files, *command, *options) == 0
    stated = _result(files / "first")["candidates"][-1]
    assert stated["candidate"] > 0 or stated["rank"] > 1
    shutil.copy(files / "first" / stated["file"], files / "renamed.png")
    assert (
        _kodalle(monkeypatch, files, "generate", "--from", "renamed.png", "--device", "cpu", "--out", "again", *again)
        == 0
    )
    (made,) = _result(files / "again")["candidates"]
    assert made["provenance"] == stated["provenance"]
    assert made["log_likelihood"] == stated["log_likelihood"]
    assert np.array_equal(_pixels(files / "again" / made["file"]), _pixels(files / "renamed.png"))
    # From that one in turn, and from the lossless WebP that a server would have sent, the model named.
    webp = encode_image(Image.open(files / "renamed.png"), "webp", metadata=stated["provenance"] | {"model": "tiny"})
    (files / "served.webp").write_bytes(webp)
    assert _kodalle(monkeypatch, files, "generate", model, "--from", "served.webp", "--out", "third", *again) == 0
    (third,) = _result(files / "third")["candidates"]
    assert np.array_equal(_pixels(files / "third" / third["file"]), _pixels(files / "renamed.png"))


@pytest.fixture
def made(files: Path, kodalle_run: Path) -> Path:
    """A folder with plain.png, rows.png, hole.png, bare.png (no metadata) and other/, a model with other weights."""
    pipeline = Pipeline.from_pretrained(kodalle_run / "model")
    kinds = {
        "plain": None,
        "rows": InitImage.from_files(files / "사진.png"),
        "hole": InitImage.from_files(files / "사진.png", mask=files / "mask.png"),
    }
    for name, init_image in kinds.items():
        generation = pipeline([CAPTION], candidates=1, init_image=init_image)[0]
        image = generation.candidates[0].image
        save_png(files / f"{name}.png", image, pipeline.provenance(generation.request, 0))
    Image.new("RGB", (32, 32)).save(files / "bare.png")
    guided = {"steps": 2, "step_size": 0.1, "cut_outs": 2, "ranker_digest": "0123456789abcdef"}
    stated = read_metadata((files / "plain.png").read_bytes()) | {"refinement": guided}
    save_png(files / "guided.png", Image.new("RGB", (32, 32)), stated)
    pipeline.save_pretrained(files / "other", dtype=torch.float16)
    moved = read_metadata((files / "plain.png").read_bytes()) | {"model": "gone/away/model"}
    save_png(files / "moved.png", Image.new("RGB", (32, 32)), moved)
    save_png(files / "odd.png", Image.new("RGB", (32, 32)), moved | {"seed": "7"})
    return files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere.png"], "--from: nowhere.png: cannot be read"),
        (["--from", "text.png"], "--from: text.png: cannot be read"),
        (["--from", "bare.png"], "--from: bare.png: carries no provenance: give an image that"),
        (["--from", "odd.png"], "seed: '7': "),
        (["--from", "moved.png"], "MODEL: gone/away/model: made moved.png and is not here"),
        (["other", "--from", "plain.png"], "MODEL: other: is not the model that made plain.png: its digest begins"),
        (["nowhere", "--from", "plain.png"], "model folder: nowhere: no such folder"),
        (["other", "a caption", "--from", "plain.png"], "CAPTION: a caption: is stated by plain.png: leave it out"),
        (["--from", "plain.png", "--seed", "3"], "--seed: 3: is stated by plain.png: leave it out"),
        (["--from", "plain.png", "--refine", "9"], "--refine: 9: is stated by plain.png: leave it out"),
        (
            ["--from", "plain.png", "--refine-with", "other"],
            "--refine-with: other: plain.png was refined with no other",
        ),
        (["--from", "guided.png"], "--refine-with: (nothing): guided.png was refined with another ranker, digest "),
        (["--from", "guided.png", "--refine-with", "other"], "--refine-with: other: has digest "),
        (["--from", "plain.png", "--size", "48x32"], "--size: 48x32: is stated by plain.png: leave it out"),
        (["--from", "plain.png", "--int8"], "--int8: True: is stated by plain.png"),
        (["--from", "plain.png", "--weights", "int4"], "--weights: int4: is stated by plain.png"),
        (["MODEL", "CAPTION", "--weights", "int5"], "--weights: int5: write int8 or int4"),
        (["--from", "plain.png", "--image", "사진.png"], "--image: 사진.png: plain.png was made without an init image"),
        (["--from", "rows.png"], "--image: (nothing): rows.png was made from an init image, SHA-256 "),
        (["--from", "rows.png", "--image", "plain.png"], "--image: plain.png: is not the init image that rows.png"),
        (["--from", "rows.png", "--image", "사진.png", "--keep-rows", "2"], "--keep-rows: 2: is stated by rows.png"),
        (["--from", "rows.png", "--image", "사진.png", "--strength", "0.2"], "--strength: 0.2: is stated by rows.png"),
        (
            ["--from", "rows.png", "--image", "사진.png", "--mask", "mask.png"],
            "--mask: mask.png: rows.png was made without",
        ),
        (
            ["--from", "hole.png", "--image", "사진.png"],
            "--mask: (nothing): hole.png was made with a mask: give it too",
        ),
        (
            ["--from", "hole.png", "--image", "사진.png", "--mask", "shifted.png"],
            "--mask: shifted.png: is not the mask",
        ),
        ([], "MODEL: (nothing): give a model and a caption, or --from FILE"),
        (["other"], "CAPTION: (nothing): give a model and a caption, or --from FILE"),
    ],
)
def test_what_is_not_as_the_metadata_state_is_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with Image.open(made / "mask.png") as mask:
        Image.fromarray(np.roll(np.asarray(mask), 3, axis=1)).save(made / "shifted.png")
    assert _kodalle(monkeypatch, made, "generate", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (made / "generations").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "text.png"], "--image: text.png: is not a JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF image"),
        (["--image", "empty.png"], "--image: empty.png: the file is empty"),
        (["--image", "cut.png"], "--image: cut.png: is truncated or damaged"),
        (["--image", "사진.png", "--mask", "nowhere.png"], "--mask: nowhere.png: no such file"),
        (["--image", "사진.png", "--mask", "square.png"], "--mask: 40 x 40: must be as large as the image"),
        (["--image", "사진.png", "--mask", "black.png"], "--mask: all black: marks nothing"),
        (["--image", "사진.png", "--mask", "white.png"], "--mask: all white: keeps nothing"),
        (["--image", "사진.png", "--mask", "clear.png"], "--mask: has transparent pixels"),
        (["--image", "사진.png", "--mask", "mask.png", "--keep-rows", "2"], "--keep-rows: 2: goes with no mask"),
        (["--image", "사진.png", "--keep-rows", "0"], "--keep-rows: 0: must be 1 or more"),
        (["--image", "사진.png", "--strength", "1.5"], "--strength: 1.5: must be a number, 0 to 1"),
        (
            ["--image", "사진.png", "--strength", "0.5", "--keep-rows", "2"],
            "--strength: 0.5: goes with neither a mask nor",
        ),
        (["--image", "사진.png", "--changed-from", " "], "--changed-from: (nothing)"),
        (
            ["--image", "사진.png", "--keep-rows", "3", "--rank-by", "log_likelihood"],
            "--rank-by: log_likelihood: is for inpainting",
        ),
        (["--refine-with", "other"], "--refine-with: other: give the steps too: --refine 10"),
        (["--refine-step-size", "0.2"], "--refine-step-size: 0.2: give the steps too: --refine 10"),
        (["--size", "48"], "--size: 48: write WIDTHxHEIGHT in pixels, e.g. 192x128"),
        (["--size", "48X32"], "--size: 48X32: write WIDTHxHEIGHT"),
        (["--size", "48x32", "--image", "사진.png"], "--size: 48x32: an init image is of the model's own size"),
    ],
)
def test_bad_images_are_one_line_before_the_model_is_read(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert _kodalle(monkeypatch, files, "generate", "missing-model", CAPTION, "--device", "cpu", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (files / "generations").exists()


@pytest.mark.parametrize("size", ["31", "4097"])
def test_a_size_that_the_model_cannot_have_is_one_line(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    model = str(kodalle_run / "model")
    assert _kodalle(monkeypatch, files, "generate", model, CAPTION, "--device", "cpu", "--enlarge", size) == 2
    assert f"error: --enlarge: {size}: must be 32, the model's, to 4096" in capsys.readouterr().err
    assert not (files / "generations").exists()


def test_too_many_rows_for_the_model(
    files: Path, kodalle_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image", "사진.png", "--keep-rows", "8", "--device", "cpu"]
    assert _kodalle(monkeypatch, files, "generate", str(kodalle_run / "model"), CAPTION, *options) == 2
    assert "error: --keep-rows: 8: this model's images have 8 rows of tokens" in capsys.readouterr().err
    assert not (files / "generations").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("16x48", "--size: 16x48: this model generates 32x32: each side must be 32 to 256 pixels"),
        ("260x32", "--size: 260x32: this model generates 32x32: each side must be 32 to 256 pixels"),
        ("50x33", "--size: 50x33: a token of this model is 4 pixels wide and high: write 48x32"),
    ],
)
def test_sizes_that_the_model_does_not_generate(
    files: Path,
    kodalle_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: str,
    message: str,
) -> None:
    command = ["generate", str(kodalle_run / "model"), CAPTION, "--size", size, "--device", "cpu"]
    assert _kodalle(monkeypatch, files, *command) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (files / "generations").exists()


def test_an_image_that_was_resized_since_is_made_at_its_own_size(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(made / "plain.png") as plain:
        save_png(made / "enlarged.png", plain.resize((64, 64)), read_metadata((made / "plain.png").read_bytes()))
    assert _kodalle(monkeypatch, made, "generate", "--from", "enlarged.png", "--device", "cpu") == 0
    assert "note: enlarged.png is 64x64, resized from 32x32, which is made again" in capsys.readouterr().err
    (again,) = _result(made / "generations")["candidates"]
    assert np.array_equal(_pixels(made / "generations" / again["file"]), _pixels(made / "plain.png"))


def test_refined_images_are_marked_and_made_again(
    files: Path, kodalle_run: Path, koclip_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another ranker than the model's own, here one that ranks alike."""
    command = ["generate", str(kodalle_run / "model"), CAPTION, "--candidates", "3", "--top", "2", "--device", "cpu"]
    ranker = ["--refine-with", str(koclip_run / "model")]
    assert _kodalle(monkeypatch, files, *command, "--refine", "2", "--refine-step-size", "0.5", *ranker) == 0
    first, second, third = _result(files / "generations")["candidates"]
    for one in (first, second):
        assert one["provenance"]["refinement"]["steps"] == 2
        assert len(one["provenance"]["refinement"]["ranker_digest"]) == 16
        assert one["score"] != one["score_as_generated"]
        file = files / "generations" / one["file"]
        assert read_metadata(file.read_bytes()) == one["provenance"]
    assert (third["file"], third["provenance"]["refinement"]) == (None, None)
    assert third["score"] == third["score_as_generated"]
    with Image.open(files / "generations" / "refined.png") as sheet:
        assert sheet.height > sheet.width > 2 * 128  # before above after
    made = files / "generations" / first["file"]
    assert _kodalle(monkeypatch, files, "generate", "--from", str(made), *ranker, "--out", "again") == 0
    (again,) = _result(files / "again")["candidates"]
    assert again["provenance"] == first["provenance"]
    assert np.array_equal(_pixels(files / "again" / again["file"]), _pixels(made))
    assert _kodalle(monkeypatch, files, *command) == 0
    assert not (files / "generations" / "refined.png").exists()
    assert [one["provenance"]["refinement"] for one in _result(files / "generations")["candidates"]] == [None] * 3


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
    for arguments, message in (
        (["missing", "빨강"], "error: model folder: missing: no such folder"),
        ([str(kodalle_run / "model"), "빨강 " * 20], "error: caption: "),
        (["missing", "빨강", "--top-p", "2"], "error: --top-p: 2.0"),
    ):
        assert _kodalle(monkeypatch, tmp_path, "continue", *arguments, "--device", "cpu") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


def test_onnx_is_a_choice_that_needs_its_files(
    kodalle_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--codec-backend", "onnx", "--device", "cpu"]
    assert _kodalle(monkeypatch, tmp_path, "generate", str(kodalle_run / "model"), CAPTION, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "kodalle export" in line
    assert not (tmp_path / "generations").exists()
