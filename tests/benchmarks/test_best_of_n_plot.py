"""The plot of best-of-N from an evaluation's JSON, as its command."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from engine.metrics.best_of_n import BestOfCurves
from tests.benchmark_scripts import run_script


def test_the_plot_is_drawn_from_the_stored_curves(tmp_path: Path) -> None:
    curves = BestOfCurves(4)
    for shift in (0.0, 0.2):
        curves.add({"ranker_score": [0.4, 0.3, 0.2, 0.1], "oracle": [shift, 1.0, 1.0, 0.0]}, {"oracle": 1.0})
    report = {
        "model_name": "tiny", "date": "2026-11-30 07:00 UTC", "hardware": {"gpu": None, "cores": 2, "cpu": "a processor"},
        "generations": {"best_of_n": curves.report()},
    }  # fmt: skip
    evaluation, out = tmp_path / "tiny.json", tmp_path / "plots" / "tiny.png"
    evaluation.write_text(json.dumps(report), encoding="utf-8")
    run_script("best_of_n_plot", str(evaluation), "--out", str(out))
    with Image.open(out) as image:
        width, height = image.size
        pixels = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).astype(int)
    assert width > 1.5 * height  # two panels
    for wanted in ((0x25, 0x63, 0xEB), (0x05, 0x96, 0x69)):  # the choice and the photographs, lines with soft edges
        assert np.abs(pixels - wanted).sum(axis=1).min() < 40
