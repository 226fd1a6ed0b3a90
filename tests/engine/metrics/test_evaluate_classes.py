"""An independent classifier's view of a tiny model's images, and the scripts that compare settings and make figures by it."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.pairs import load_pairs
from engine.errors import InputError
from engine.metrics.evaluate import evaluate, table
from engine.pipeline.image_encoding import read_metadata
from tests.benchmark_scripts import run_script
from tests.engine.metrics.evaluation_pairs import with_garments, write_classifier, write_pairs


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
    out = tmp_path / "figures"
    arguments = [str(model), str(pairs), "--independent-classifier", str(classifier), "--quick", "--out", str(out)]
    printed = run_script("clothing_figures", *arguments).stdout
    document = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == document
    assert document.keys() >= {"commit", "hardware", "versions", "partial_captions"}
    assert {one["reached"] for one in document["figures"]} > {"not measured"}  # distances, of 4 photographs
    sheets = {"sheet.png", "sheet-captioned.png", "sheet-large.png", "sheet-reconstructions.png"}
    assert {file.name for file in out.iterdir()} == sheets | {"figures.json"}
    refused = run_script("clothing_figures", str(model), str(pairs), "--independent-classifier", str(tmp_path))
    assert refused.returncode == 2
    assert "train-classifier" in refused.stderr.splitlines()[-1]
