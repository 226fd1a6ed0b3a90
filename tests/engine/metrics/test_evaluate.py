"""A tiny model of every part, evaluated: numbers against plain computations, parts that are missing, faults."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from engine.cli import app
from engine.config.codec import VqganConfig
from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import load_image, load_pairs
from engine.data.tokenizer import train_tokenizer
from engine.errors import InputError
from engine.metrics.classifier_training import fit
from engine.metrics.evaluate import evaluate, evaluate_to_file, mean_recall, table
from engine.metrics.generations import _as_often_as_held_out, _Tally
from engine.metrics.independent_classifier import save_classifier
from engine.metrics.lite0_features import Lite0Encoder
from engine.metrics.parts import EvaluationRun
from engine.models.folder import Part, PartName, load_folder_tokenizer, load_part, write_model_folder
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.pipeline import Pipeline
from tests.benchmark_scripts import run_script
from tests.paths import REPOSITORY

COLOURS = {"레드": (200, 40, 50), "블루": (50, 80, 180), "그린": (40, 140, 70), "블랙": (30, 30, 30)}
VQGAN = VqganConfig(
    image_size=32, base_channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    latent_channels=16, embed_dim=8, codebook_size=32, norm_groups=4,
)  # fmt: skip
KOCLIP = KoclipConfig(
    image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=8,
    text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=10, embed_dim=16,
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    dim=32, num_layers=1, num_heads=2, head_dim=16, text_vocab_size=64, text_seq_len=8, text_position_rows=10,
    image_vocab_size=32, image_grid_size=4,
)  # fmt: skip


def write_pairs(folder: Path, *, held_out: int, train: int = 16) -> Path:
    """Squares on a light ground: 16 to train on, `held_out` held out, four of which share a caption with another."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(train + held_out):
        name = list(COLOURS)[number % 4]
        pixels = np.full((32, 32, 3), 235, np.uint8)
        size = 4 + number % 3
        pixels[16 - 2 * size : 16 + 2 * size, 8:24] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"images/{number:03d}.png")
        lines.append({
            "key": f"{number:03d}", "image": f"images/{number:03d}.png", "photo": f"{number:03d}",
            "caption": f"{name} 네모 {size}", "split": "train" if number < train else "validation",
            "attributes": {"색상": name},
        })  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("evaluate") / "pairs", held_out=16)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Callable[..., Path]:
    """`make_model("vqgan", "koclip")`: a folder with these parts, weights random and always the same."""
    folder = tmp_path_factory.mktemp("models")

    def make(*names: PartName) -> Path:
        modules: dict[PartName, tuple[Any, Any]] = {
            "vqgan": (Vqgan, VQGAN), "transformer": (KoDalle, TRANSFORMER), "koclip": (KoClip, KOCLIP),
        }  # fmt: skip
        parts: dict[PartName, Part] = {}
        for name in names:
            torch.manual_seed(0)
            module, config = modules[name]
            parts[name] = Part(config, module(config).state_dict())
        captions = [pair.captions[0] for pair in load_pairs(pairs).train]
        path = folder / ("-".join(names) or "none")
        write_model_folder(path, parts, card="tiny", tokenizer=train_tokenizer(captions, vocab_size=60))
        return path

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("vqgan", "transformer", "koclip")


@pytest.fixture(scope="module")
def evaluated(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out") / "evaluation.json"
    evaluate_to_file(model, pairs, out, generations=12, candidates=5, seed=3)
    return json.loads(out.read_text(encoding="utf-8")), out


def test_the_report_states_what_was_measured(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, _ = evaluated
    assert set(report["model"]) == {"vqgan", "transformer", "koclip", "tokenizer"}
    assert report["pairs"] == {
        "validation": 16, "validation_captions": 12, "train": 16, "set_aside": 0, "split": "prepared",
    }  # fmt: skip
    assert report["torch"] == torch.__version__
    assert report["reconstruction"]["images"] == report["kodalle"]["pairs"] == report["koclip"]["pairs"] == 16
    generations = report["generations"]
    assert (generations["captions"], generations["candidates"], generations["seed"]) == (12, 5, 3)
    assert {one["seed"] for one in generations["top_ranked"]} == {3}
    assert len({one["caption"] for one in generations["top_ranked"]}) == 12
    assert set(report["seconds"]) == {"loading", "reconstruction", "kodalle", "koclip", "generations", "total"}
    lines = table(report).splitlines()
    assert "koclip" in lines
    assert f"  pairs{16:>{lines[1].index('16') - 5}}" in lines  # indented under its section, values in one column


def test_losses_equal_those_of_one_batch(evaluated: tuple[dict[str, Any], Path], model: Path, pairs: Path) -> None:
    held = load_pairs(pairs).validation
    images = torch.from_numpy(np.stack([load_image(pair, 32) for pair in held])).permute(0, 3, 1, 2).float() / 255
    text = load_folder_tokenizer(model).encode([pair.captions[0] for pair in held], 8).tokens
    with torch.no_grad():
        found = load_part(model, "transformer")(text, load_part(model, "vqgan").encode(images))
        clip_loss = load_part(model, "koclip")(images, text)
    report = evaluated[0]
    assert report["kodalle"]["loss_text"] == pytest.approx(float(found.loss_text), rel=1e-5)
    assert report["kodalle"]["loss_image"] == pytest.approx(float(found.loss_image), rel=1e-5)
    assert report["kodalle"]["image_top1"] == pytest.approx(float(found.image_top1), abs=1e-6)
    assert report["koclip"]["loss_batch"] == 16
    assert report["koclip"]["loss"] == pytest.approx(float(clip_loss), rel=1e-4)
    assert report["koclip"]["recall_among"] == 12


def test_scores_and_colours_have_their_bounds(evaluated: tuple[dict[str, Any], Path]) -> None:
    generations = evaluated[0]["generations"]
    assert generations["koclip_score"]["top_ranked"] >= generations["koclip_score"]["random"]
    tops = [one["score"] for one in generations["top_ranked"]]
    assert generations["koclip_score"]["top_ranked"] == pytest.approx(sum(tops) / 12)
    colour = generations["colour_agreement"]
    assert (colour["real"], colour["num_real"], colour["names"], colour["num_captions"]) == (1.0, 16, 4, 12)
    assert colour["commonest"] == 0.25
    assert not {"distances", "nearest", "class_agreement"} & set(generations)


def test_the_sheets_show_every_caption_once(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, out = evaluated
    assert report["generations"]["sheets"] == {
        "plain": "evaluation.png", "captioned": "evaluation-captioned.png", "large": "evaluation-large.png",
        "reconstructions": "evaluation-reconstructions.png",
    }  # fmt: skip
    sizes = {}
    for name, file in report["generations"]["sheets"].items():
        with Image.open(out.parent / file) as sheet:
            sizes[name] = sheet.size
    assert sizes["plain"] == (10 * 36 + 4, 2 * 36 + 4)
    assert sizes["reconstructions"] == (10 * 36 + 4, 2 * 68 + 4)
    assert sizes["captioned"][0] == 4 + 8 * 164
    assert sizes["large"][0] == 4 + 4 * 72
    for name in ("plain", "captioned"):
        metadata = read_metadata((out.parent / report["generations"]["sheets"][name]).read_bytes())
        assert metadata["captions"] == report["generations"]["top_ranked"]


def test_more_captions_begin_with_the_same(model: Path, pairs: Path, evaluated: tuple[dict[str, Any], Path]) -> None:
    few = evaluate(model, pairs, generations=3, candidates=5, seed=3)["generations"]["top_ranked"]
    many = evaluated[0]["generations"]["top_ranked"]
    assert [one["caption"] for one in few] == [one["caption"] for one in many[:3]]
    assert [one["candidate"] for one in few] == [one["candidate"] for one in many[:3]]


def test_equal_arguments_equal_reports(model: Path, pairs: Path) -> None:
    first, again = (evaluate(model, pairs, generations=2, candidates=2, batch_size=5) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.slow
def test_distances_and_nearest_photographs(model: Path, tmp_path: Path) -> None:
    many = write_pairs(tmp_path / "many", held_out=50, train=60)
    phases: list[tuple[str, int, int]] = []
    generations = evaluate(
        model, many, generations=10, candidates=3, distance_images=60, sheets=tmp_path / "sheet.png",
        on_progress=lambda *phase: phases.append(phase),
    )["generations"]  # fmt: skip
    to_held_out, to_training = generations["distances"]["to_held_out"], generations["distances"]["to_training"]
    assert (to_held_out["generations"]["num_real"], to_held_out["generations"]["num_other"]) == (50, 60)
    assert to_held_out["generations"]["kid_lite0_features"] > 0.0
    assert to_held_out["generations"]["fid_lite0_features"] is None  # of 50 photographs
    assert to_held_out["reconstructed_training_images"]["num_other"] == 60
    assert (to_training["generations"]["num_real"], to_training["held_out"]["num_other"]) == (60, 50)
    nearest = generations["nearest"]
    assert len(nearest["distances"]) == len(nearest["photographs"]) == 10
    trained_on = {pair.key for pair in load_pairs(many).train}
    assert set(nearest["photographs"]) <= trained_on
    assert nearest["sheet"] == "sheet-nearest.png"
    with Image.open(tmp_path / "sheet-nearest.png") as sheet:
        assert sheet.size == (4 + 5 * 72, 4 + 2 * (32 + 4 + 15 + 8))
    assert ("koclip", 50, 50) in phases
    assert ("generating", 10, 10) in phases
    assert ("generating for distances", 60, 60) in phases
    too_few = evaluate(model, many, generations=2, candidates=2, distance_images=49)["generations"]
    assert "50 of each are needed" in too_few["distances"]["left_out"]


def test_the_set_for_distances_has_captions_as_often_as_the_photographs(model: Path, pairs: Path) -> None:
    """Its images are those of the seed's candidates, whether they were ranked or not."""
    encoded: list[torch.Tensor] = []

    class Encoder:
        """Keeps the images; a feature is their mean."""

        def encode(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
            kept = list(batches)
            encoded.extend(kept)
            return torch.cat(kept).mean(dim=(1, 2, 3))[:, None]

    held = load_pairs(pairs).validation
    pipeline = Pipeline.from_pretrained(model, dtype=torch.float32)
    run = EvaluationRun(torch.device("cpu"), 3, 16, lambda *_: None)
    repeated = next(text for text, times in Counter(pair.captions[0] for pair in held).items() if times == 2)
    wanted = pipeline([repeated], candidates=4, seed=3)[0]
    pixels = {one.candidate: np.asarray(one.image).astype(np.float32).mean() / 255 for one in wanted.candidates}
    tally = _Tally(features={repeated: torch.tensor([[100.0], [101.0], [102.0]])})  # of three candidates, ranked before
    found = _as_often_as_held_out(run, pipeline, held, Encoder(), tally, 32)  # type: ignore[arg-type]
    assert len(found) == 32
    assert {100.0, 101.0, 102.0} <= set(found[:, 0].tolist())  # 4 of the caption: 3 from before, 1 new
    assert sum(map(len, encoded)) == 29
    assert min(abs(found[:, 0] - pixels[3])) < 2e-3


def test_a_folder_is_evaluated_on_what_it_has(make_model: Callable[..., Path], pairs: Path) -> None:
    codec = evaluate(make_model("vqgan"), pairs)
    assert "reconstruction" in codec
    assert not {"kodalle", "koclip", "generations"} & set(codec)
    ranker = evaluate(make_model("koclip"), pairs)
    assert "koclip" in ranker
    assert not {"kodalle", "reconstruction", "generations"} & set(ranker)
    transformer = evaluate(make_model("vqgan", "transformer"), pairs, generations=2, candidates=2)
    assert transformer["generations"]["top_ranked"][0]["score"] is None
    assert not {"koclip_score", "distances", "class_agreement"} & set(transformer["generations"])
    assert "generations" not in evaluate(make_model("vqgan", "transformer"), pairs, generations=0)


def test_faults(make_model: Callable[..., Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no validation split"):
        evaluate(make_model("vqgan"), write_pairs(tmp_path / "pairs", held_out=0))
    with pytest.raises(InputError, match="holds none of vqgan, transformer, koclip"):
        evaluate(make_model(), pairs)
    with pytest.raises(InputError, match="has no vqgan"):
        evaluate(make_model("transformer"), pairs)
    with pytest.raises(InputError, match="--candidates: 0"):
        evaluate(make_model("vqgan"), pairs, candidates=0)
    with pytest.raises(InputError, match="--out"):
        evaluate_to_file(make_model("vqgan"), pairs, tmp_path / "sheet.png")
    with pytest.raises(InputError, match="--out"):
        evaluate_to_file(make_model("vqgan"), pairs, tmp_path)


def test_recall_averages_over_choices_of_a_hundred() -> None:
    koclip = KoClip(KOCLIP)
    tokens = torch.arange(250)[:, None] % 150  # 150 captions, 100 of them with two images
    own = torch.nn.functional.normalize(torch.randn(150, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = own[tokens[:, 0]]
    generator = torch.Generator().manual_seed(0)
    perfect = mean_recall(koclip, texts, texts, tokens, generator)
    assert perfect == {
        "recall_at_1": pytest.approx(1), "recall_at_5": pytest.approx(1), "recall_among": 100, "recall_rounds": 20,
    }  # fmt: skip
    blind = mean_recall(koclip, texts.roll(50, 0), texts, tokens, generator)
    # at chance: 0.05 +- sqrt(0.05 * 0.95 / 100), the rounds share images
    assert math.isclose(blind["recall_at_5"], 0.05, abs_tol=0.08)
    few = mean_recall(koclip, texts[:9], texts[:9], tokens[:9], generator)
    assert (few["recall_among"], few["recall_rounds"]) == (9, 1)


def test_command(model: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "here" / "evaluation.json"
    done = CliRunner().invoke(
        app, ["evaluate", str(model), str(pairs), "--out", str(out), "--generations", "3", "--candidates", "2"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["generations"]["colour_agreement"]["real"] == 1.0
    assert out.with_suffix(".png").is_file()
    assert "  psnr db" in done.output


def with_garments(folder: Path) -> Path:
    """`write_pairs` with captions of the grammar: shirts, wider than tall, and trousers, taller than wide."""
    file = folder / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines):
        garment, category = [("상의", "셔츠"), ("하의", "팬츠")][number // 4 % 2]
        colour = line["attributes"]["색상"]
        line["caption"] = f"{garment}에서 색상은 {colour}이다. {garment}에서 카테고리는 {category}이다."
        line["attributes"] = {"garment": garment, "색상": colour, "카테고리": category}
        pixels = np.full((32, 32, 3), 235, np.uint8)
        pixels[4:28, 10:22] = COLOURS[colour]
        Image.fromarray(pixels if category == "팬츠" else pixels.transpose(1, 0, 2)).save(folder / line["image"])
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_classifier(folder: Path, pairs: Path, *, blind: bool = False) -> Path:
    """Of shirts and trousers: by whether the subject, in `with_garments`, is taller than wide; `blind`: one answer."""
    classes = find_caption_classes(load_pairs(pairs))
    assert classes is not None
    encoder, by_class = Lite0Encoder(torch.device("cpu")), []
    for garment in ("셔츠", "팬츠"):
        some = [pair for pair in load_pairs(pairs).train if garment in pair.captions[0]]
        images = np.stack([load_image(pair, 32) for pair in some])
        by_class.append(encoder.encode([torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255]))
    order = [0, 1] if classes.facts[0][0].value == "셔츠" else [1, 0]
    labels = torch.tensor([number for number, own in zip(order, by_class, strict=True) for _ in own])
    classifier = fit(torch.cat(by_class), labels, classes.facts)
    if blind:
        classifier = dataclasses.replace(classifier, weight=torch.zeros_like(classifier.weight))
    save_classifier(folder, classifier, {})
    return folder


@pytest.mark.slow
def test_an_independent_classifier_assigns_classes(model: Path, tmp_path: Path) -> None:
    pairs = with_garments(write_pairs(tmp_path / "pairs", held_out=16))
    classifier = write_classifier(tmp_path / "classifier", pairs)
    with pytest.raises(InputError, match=r"--independent-classifier.*no such file"):
        evaluate(model, pairs, independent_classifier=model)

    def score(folder: Path, **options: Any) -> dict[str, Any]:
        return evaluate(model, pairs, generations=8, candidates=4, independent_classifier=folder, **options)

    whole = score(classifier)
    assert whole["independent_classifier"] == {
        "images": 16, "accuracy": 1.0, "balanced_accuracy": 1.0, "majority": 0.5, "usable": True,
    }  # fmt: skip
    generations = whole["generations"]
    assert generations["partial_captions"] is False
    found = generations["class_agreement"]
    assert (found["classes"], found["num_real"], found["num_captions"], found["commonest"]) == (2, 16, 8, 0.5)
    assert found["real"] == 1.0
    # of random weights: a share of 8 x 4 images
    assert {found[name] * 32 for name in ("real", "top_ranked", "random")} <= set(range(33))
    both = generations["colour_and_class_agreement"]
    assert both["real"] == 1.0
    assert both["random"] <= min(found["random"], generations["colour_agreement"]["random"])
    partial = score(classifier, partial_captions=True)["generations"]
    captions = [one["caption"] for one in partial["top_ranked"]]
    assert partial["partial_captions"] is True
    assert all(caption.count("이다.") == 1 for caption in captions)
    with_colour = [caption for caption in captions if "색상" in caption]
    assert partial["colour_agreement"]["num_captions"] == len(with_colour) < len(captions)
    assert partial["class_agreement"]["num_captions"] == len(captions)  # 상의 alone determines the class, too
    with pytest.raises(InputError, match="is for whole captions"):
        score(classifier, partial_captions=True, distance_images=50)
    with pytest.raises(InputError, match="leave --generations above 0"):
        evaluate(model, pairs, generations=0, distance_images=50)
    alike = write_pairs(tmp_path / "alike", held_out=4, train=1)
    with pytest.raises(InputError, match="fewer than two classes"):
        evaluate(model, alike, generations=1, independent_classifier=classifier)


def test_a_classifier_that_is_seldom_right_is_left_out_and_the_report_says_so(model: Path, tmp_path: Path) -> None:
    pairs = with_garments(write_pairs(tmp_path / "pairs", held_out=16))
    blind = write_classifier(tmp_path / "classifier", pairs, blind=True)
    report = evaluate(model, pairs, generations=2, candidates=2, independent_classifier=blind)
    assert report["independent_classifier"]["usable"] is False
    assert report["independent_classifier"]["accuracy"] == 0.5
    assert "worth nothing" in report["independent_classifier"]["left_out"]
    assert "worth nothing" in table(report)
    assert not {"class_agreement", "colour_and_class_agreement"} & set(report["generations"])


@pytest.mark.slow
def test_settings_are_compared_on_training_captions(model: Path, tmp_path: Path) -> None:
    """benchmarks/sampling_options.py, whole: no held-out caption is used."""
    pairs = with_garments(write_pairs(tmp_path / "pairs", held_out=4))
    classifier = write_classifier(tmp_path / "classifier", pairs)
    printed = run_script(
        "sampling_options", str(model), str(pairs), "--independent-classifier", str(classifier),
        "--out", str(tmp_path / "o.json"),
        "--temperature", "0.5", "2", "--guidance", "1", "--captions", "3", "--candidates", "2",
        "--sheets", str(tmp_path / "sheets"),
    ).stdout  # fmt: skip
    document = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == document
    assert document.keys() >= {"commit", "hardware", "versions", "chosen"}
    cool, hot = document["settings"]
    assert (cool["temperature"], hot["temperature"], cool["guidance_scale"]) == (0.5, 2, 1)
    assert 0 <= cool["whole"]["difference"] < hot["whole"]["difference"]
    trained_on = {pair.captions[0] for pair in load_pairs(pairs).train}
    shown = read_metadata((tmp_path / "sheets" / "whole-t2-g1.png").read_bytes())["captions"]
    assert len(shown) == 3
    assert {one["caption"] for one in shown} <= trained_on


@pytest.mark.slow
def test_figures_are_made_by_one_command(model: Path, tmp_path: Path) -> None:
    """benchmarks/clothing_figures.py, whole."""
    pairs = with_garments(write_pairs(tmp_path / "pairs", held_out=4))
    classifier = write_classifier(tmp_path / "classifier", pairs)
    script = REPOSITORY / "benchmarks" / "clothing_figures.py"
    out = tmp_path / "figures"
    command = [
        sys.executable, str(script), str(model), str(pairs), "--independent-classifier", str(classifier), "--quick",
        "--out", str(out),
    ]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    document = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == document
    assert document.keys() >= {"commit", "hardware", "versions", "partial_captions"}
    assert {one["reached"] for one in document["figures"]} > {"not measured"}  # distances, of 4 photographs
    sheets = {"sheet.png", "sheet-captioned.png", "sheet-large.png", "sheet-reconstructions.png"}
    assert {file.name for file in out.iterdir()} == sheets | {"figures.json"}
    refused = subprocess.run([*command[:4], "--independent-classifier", str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "train-classifier" in refused.stderr.splitlines()[-1]


def test_stored_reports_name_machine_versions_and_commit(evaluated: tuple[dict[str, Any], Path]) -> None:
    report, _ = evaluated
    assert report["hardware"]["device"] == "cpu"
    assert report["hardware"]["cpu"]
    assert report["hardware"]["cpu_isa"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["commit"]
