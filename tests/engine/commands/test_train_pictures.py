"""From a folder of captioned images to a served model at a tiny size; what is refused; what a second call does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from engine import cli
from engine.commands import train_pictures
from engine.commands.train_plan import Request
from engine.config_files import load_run
from engine.data.source_listing import source_listing
from engine.errors import InputError
from engine.files import write_json

COLOURS = {"red": (210, 40, 40), "blue": (40, 70, 210), "green": (40, 160, 70)}
TINY = (
    "vqgan.loop.steps=4",
    "vqgan.model.base_channels=8",
    "vqgan.loss.perceptual=none",
    "koclip.loop.steps=3",
    "koclip.model.image_encoder=efficientnet",
    "koclip.model.image_width=0.1",
    "koclip.model.image_depth=0.1",
    "koclip.model.image_hidden_dim=128",
    "kodalle.loop.steps=4",
    "kodalle.model.num_layers=1",
    "kodalle.augmented_views=1",
)


def draw(folder: Path, count: int) -> Path:
    """Coloured squares and circles, captioned in English."""
    folder.mkdir(parents=True)
    for number in range(count):
        colour, shape = list(COLOURS)[number % 3], ("square", "circle")[number // 3 % 2]
        image = Image.new("RGB", (40, 32), "white")
        pen = ImageDraw.Draw(image)
        box = [8 + number % 4, 6, 28 + number % 4, 26]
        (pen.rectangle if shape == "square" else pen.ellipse)(box, fill=COLOURS[colour])
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {colour} {shape}\n", encoding="utf-8")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw(tmp_path / "photos", 24)


@pytest.mark.slow
def test_copies_of_one_image_are_refused_before_training(photos: Path, tmp_path: Path, trained: list[str]) -> None:
    """The plan holds some files out; preparation finds that they are one photograph, which stays on one side."""
    for image in photos.glob("*.png"):
        image.write_bytes((photos / "00.png").read_bytes())
    with pytest.raises(InputError, match=r"PHOTOS: .*0 held out are left .*copies of each other"):
        train_pictures.train_pictures(Request(photos, tmp_path / "run", TINY))
    assert trained == []


@pytest.mark.slow
def test_pictures_to_a_model_with_a_report(
    photos: Path,
    tmp_path: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from engine.pipeline.pipeline import Pipeline

    out = tmp_path / "run"
    request = Request(photos, out, TINY)

    # Interrupted in the evaluation: everything before it is done.
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_pictures, "_evaluate", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train_pictures.train_pictures(request)
        assert stopped.value.code == 130
    assert trained == ["vqgan", "koclip", "kodalle"]
    assert not (out / "report.html").exists()
    printed, errors = capsys.readouterr()
    assert "24 captioned images" in printed
    assert "[8/8]" not in printed
    assert errors.endswith("stopped while measuring it on held-out images: run the same command to go on\n")

    # The same command goes on, without its options too; nothing is trained again.
    train_pictures.train_pictures(Request(photos, out))
    assert trained == ["vqgan", "koclip", "kodalle"]
    printed = capsys.readouterr().out
    assert "goes on as it was planned" in printed
    assert f"kodalle serve {out / 'model'} --port 8000" in printed

    report = (out / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in report  # one file, nothing fetched
    assert report.count("<svg") >= 5
    assert report.count("data:image/png") > 8
    assert report.count('class="pair"') == len(
        json.loads((out / "evaluation.json").read_text())["generations"]["top_ranked"]
    )
    for verdict in json.loads((out / "verdicts.json").read_text(encoding="utf-8")):
        assert verdict["text"] in (out / "report.md").read_text(encoding="utf-8")
        assert verdict["text"] in (out / "model" / "model_card.md").read_text(encoding="utf-8")
    pipeline = Pipeline.from_pretrained(out / "model", device=torch.device("cpu"))
    assert pipeline(["a red circle"], candidates=2, seed=1)[0].candidates[0].image.size == (32, 32)

    # The configs are ordinary ones.
    for stage in ("vqgan", "koclip", "kodalle"):
        assert load_run(out / "configs" / f"{stage}.yaml").loop.steps in (3, 4)

    # A third call finds all of it done.
    before = {path: path.stat().st_mtime_ns for path in (out / "model").glob("*.safetensors")}
    train_pictures.train_pictures(request)
    assert {path: path.stat().st_mtime_ns for path in (out / "model").glob("*.safetensors")} == before

    # Training on from it with a word that it has not seen: old rows are kept, the vocabulary grows where it must.
    more = draw(tmp_path / "more", 12)
    for file in more.glob("*.txt"):
        file.write_text(file.read_text(encoding="utf-8").replace("red", "crimson"), encoding="utf-8")
    train_pictures.train_pictures(
        Request(more, tmp_path / "on", ("vqgan.loop.steps=1", "koclip.loop.steps=1", "kodalle.loop.steps=1"), None, out / "model")
    )  # fmt: skip
    old = json.loads((out / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    new = json.loads((tmp_path / "on" / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert old.items() < new.items()
    assert new["crimson"] == max(old.values()) + 1


@pytest.mark.parametrize(
    ("losses", "scores", "taken"),
    [
        ([4.0, 3.0, 3.01], {}, "model"),  # not past its best: nothing is compared
        ([4.0, 3.0, 3.5], {"model": 0.6, "model-best": 0.4}, "model"),
        ([4.0, 3.0, 3.5], {"model": 0.4, "model-best": 0.6}, "model-best"),
        ([4.0, 3.0, 3.5], {"model": 0.5, "model-best": 0.5}, "model-best"),
    ],
)
def test_of_two_models_the_one_whose_images_fit_their_captions_is_taken(
    losses: list[float], scores: dict[str, float], taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.metrics import caption_score as module
    from engine.models import folder_config

    run = tmp_path / "kodalle"
    for name in ("model", "model-best"):
        (run / name).mkdir(parents=True)
    lines = [json.dumps({"step": step, "validation_loss": loss}) + "\n" for step, loss in enumerate(losses)]
    (run / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    calls: list[str] = []

    def score(model: Path, pairs: Path, *, seed: int) -> float:
        calls.append(model.name)
        return scores[model.name]

    monkeypatch.setattr(module, "caption_score", score)
    monkeypatch.setattr(folder_config, "weights_digest", lambda place, part: f"{place.name}-{part}")
    for _ in range(2):
        assert train_pictures._choose_model(tmp_path, tmp_path)["taken"] == taken
    assert calls == list(scores)  # once: the second call reads choice.json


@pytest.fixture
def started(photos: Path, tmp_path: Path) -> Path:
    """A run folder as `_start` leaves it, with nothing trained."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "source.txt").write_text(source_listing(photos), encoding="utf-8")
    write_json(
        out / "plan.json", {"overrides": ["vqgan.loop.steps=9"], "minutes": 90.0, "start_from": None, "cut_out": None}
    )
    return out


def _change_a_caption(photos: Path, out: Path) -> Request:
    (photos / "03.txt").write_text("something else", encoding="utf-8")
    return Request(photos, out)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (_change_a_caption, r"PHOTOS: .*photos: .*run was started with other files: 1 changed \(the first: 03.txt\)"),
        (lambda photos, out: Request(photos, out, minutes=30), "--minutes: 30: .*run was planned with 90.0"),
        (lambda photos, out: Request(photos, out, ("vqgan.loop.steps=8",)), "--set: vqgan.loop.steps=8: .*was planned"),
        (lambda photos, out: Request(photos, out, start_from=photos), "--from: .*run was planned with none"),
        (lambda photos, out: Request(photos, out, cut_out=True), "--cut-out: True: .*run was planned with none"),
        (lambda photos, out: Request(photos / "nowhere", out), "PHOTOS: .*nowhere: no such folder"),
        (lambda photos, out: Request(photos, photos / "run"), "--out: .*lies inside"),
        (lambda photos, out: Request(photos, photos.parent), "--out: .*holds something other than a run"),
    ],
)
def test_what_is_refused_by_name(
    request_of: Callable[[Path, Path], Request], message: str, photos: Path, started: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_pictures.train_pictures(request_of(photos, started))
    assert not (started / "pairs").exists()


def test_too_few_pictures_are_refused_before_anything_is_planned(tmp_path: Path) -> None:
    few = draw(tmp_path / "few", 5)
    for _ in range(2):  # what the first try leaves does not hinder the second
        with pytest.raises(InputError, match=r"PHOTOS: .*few: 5 captioned images: give 10 or more"):
            train_pictures.train_pictures(Request(few, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_plan_prints_and_stops(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [part for text in TINY for part in ("--set", text)]
    answer = CliRunner().invoke(cli.app, ["train", str(photos), "--out", str(out), "--plan", *options])
    assert answer.exit_code == 0, answer.output
    for text in (
        "image size",
        "32 x 32 pixels",
        "half of the images are no larger than 32",
        "parameters",
        "activations",
        "in all",
    ):
        assert text in answer.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PHOTOS", "loop.steps=4"], "KEY=VALUE: loop.steps=4: is for a config"),
        (["config.yaml", "--minutes", "4"], "--minutes: 4.0: is for a folder of captioned images"),
        (["config.yaml", "--plan"], "--plan: True: is for a folder"),
        (["nowhere.yaml"], "config: nowhere.yaml: no such file"),
    ],
)
def test_options_of_the_other_form_are_refused(
    arguments: list[str], message: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    given = [str(photos) if argument == "PHOTOS" else argument for argument in arguments]
    answer = CliRunner().invoke(cli.app, ["train", *given])
    assert isinstance(answer.exception, InputError)
    assert message in str(answer.exception)
