"""The report of an evaluation: every figure once, beside what it must be read beside, with its pictures inside the page."""

import html
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from engine.training.report.evaluation_report import write_evaluation_report
from engine.training.report.evaluation_rows import evaluation_rows


def _distances(fid: float, **more: float) -> dict[str, Any]:
    return {
        "num_real": 273, "num_other": 1000, "num_features": 1280, "fid_lite0_features": fid, "kid_lite0_features": fid / 1000,
        "kid_lite0_features_std": 0.01, "precision_lite0_features": 0.5, "recall_lite0_features": None, **more,
    }  # fmt: skip


def _shares(top: float) -> dict[str, Any]:
    return {"top_ranked": top, "random": top - 0.1, "real": 0.9, "num_captions": 40, "commonest": 0.4}


def _report() -> dict[str, Any]:
    curve = {
        "captions": 12, "top_ranked": [0.5, 0.6, 0.7], "standard_error": [0.1, 0.1, 0.1], "best": [0.5, 0.7, 0.9], "real": 0.8,
    }  # fmt: skip
    rows = {
        "generations": _distances(354.7), "reconstructed_held_out": _distances(219.6), "training_images": _distances(241.5),
        "reconstructed_training_images": _distances(266.9),
    }  # fmt: skip
    score = {"images": 1000, "splits": 1, "mean": 8.0, "std": None}
    return {
        "model_name": "clothes & more", "date": "2026-11-30", "commit": "abc",
        "hardware": {"cores": 2, "cpu": "a processor", "device": "cpu"},
        "pairs": {"validation": 273, "train": 2691},
        "reconstruction": {
            "images": 273, "psnr_db": 25.2, "codebook_used": 0.99,
            "features": {"name": "lite0", "title": "EfficientNet-Lite0 at 128 pixels", "weights": "x"},
            "distances": {"held_out": _distances(219.6), "training_images": _distances(30.1)},
        },
        "koclip": {"pairs": 273, "recall_at_1": 0.56, "recall_at_5": 0.93, "recall_among": 100},
        "independent_classifier": {"images": 273, "accuracy": 0.89, "majority": 0.4, "usable": True},
        "generations": {
            "captions": 40, "candidates": 16, "difference": 0.1,
            "koclip_score": {"real": 0.7, "real_of_another_caption": -0.04, "top_ranked": 0.79, "random": 0.73},
            "clip_score": {
                "name": "vit", "weights": "y", "captions": "in English", "real": 27.0, "real_of_another_caption": 20.0,
                "top_ranked": 26.0, "random": 25.0, "also_ranked": False,
            },
            "colour_agreement": _shares(0.8), "class_agreement": _shares(0.85),
            "distances": {"to_held_out": rows}, "inception_score_lite0_features": dict.fromkeys(
                ("generations", "training_images", "reconstructed_training_images", "held_out"), score
            ),
            "best_of_n": {"candidates": 4, "numbers": [1, 2, 4], "measures": {"class_agreement": curve}, "sheet": "e-best-of-n.png"},
            "sheets": {"captioned": "e-captioned.png", "reconstructions": "missing.png"},
        },
    }  # fmt: skip


def test_rows_have_their_neighbours() -> None:
    rows = {row.name: row for row in evaluation_rows(_report())}
    fid = rows["FID to held-out photographs"]
    assert (fid.value, fid.real, fid.floor, fid.better) == (354.7, 241.5, 266.9, "lower")
    assert fid.features == "EfficientNet-Lite0 at 128 pixels"
    assert fid.of == "1,000 generations, 273 held-out photographs"
    assert rows["precision to held-out photographs"].better == "higher"
    assert "recall to held-out photographs" not in rows  # was not measured
    reconstruction = [row for row in evaluation_rows(_report()) if row.name == "reconstruction FID"]
    assert [row.value for row in reconstruction] == [219.6, 30.1]
    clip = rows["CLIP score"]
    assert (clip.value, clip.random, clip.real, clip.features) == (26, 25, 27, "vit")
    assert "in English; another caption's photograph: 20" in clip.of
    best = evaluation_rows(_report())[-1]
    assert (best.section, best.value, best.random, best.real) == ("best of 4", 0.7, 0.5, 0.8)
    assert "a perfect ranker: 0.9" in best.of
    assert evaluation_rows({"pairs": {"validation": 1}}) == []


def test_pages_hold_every_figure_and_their_pictures(tmp_path: Path) -> None:
    out, report = tmp_path / "e.json", _report()
    out.write_text(json.dumps(report), encoding="utf-8")
    for name in ("e-captioned.png", "e-best-of-n.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    path = write_evaluation_report(out, report)
    assert (path.name, sorted(each.name for each in tmp_path.glob("*.md"))) == ("e-report.html", ["e-report.md"])
    page, text = path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")
    assert "Evaluation of clothes &amp; more" in page
    for row in evaluation_rows(report):
        assert f"<td>{html.escape(row.name)}</td>" in page
        assert f"| {row.name} |" in text
    assert page.count("data:image/png;base64,") == 2  # the file that is missing is left out
    assert page.count("<polyline") == 3  # the ranker's choice, a perfect one, the photographs
    assert "best-ranked of | 1 | 2 | 4 | photographs" in text
    assert "<b>FID</b>" in page
    assert "<b>recall</b>" not in page
    assert not re.search(r"src=\"(?!data:)", page)


def test_what_was_left_out_has_its_reason(tmp_path: Path) -> None:
    report = _report()
    report["reconstruction"]["distances"] = {"left_out": "20 generations: 50 of each are needed"}
    del report["generations"]["distances"], report["generations"]["inception_score_lite0_features"]
    text = write_evaluation_report(tmp_path / "e.json", report).with_suffix(".md").read_text(encoding="utf-8")
    assert "Left out: distances between sets: 20 generations: 50 of each are needed" in text
    assert "FID to held-out photographs" not in text
