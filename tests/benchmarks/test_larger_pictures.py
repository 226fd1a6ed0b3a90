"""The scripts of larger and refined images with a tiny model: documents and sheets, and what a seam is."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmark_scripts import run_script
from tests.paths import REPOSITORY

CAPTIONS = ["빨강 바탕에 파랑 네모", "초록 네모"]


def test_sizes_and_tamings_rule(kodalle_run: Path, tmp_path: Path) -> None:
    options = ["--sizes", "48x32", "--candidates", "2", "--taming", "--out", str(tmp_path)]
    answer = run_script("larger_pictures", str(kodalle_run / "model"), *CAPTIONS, *options)
    assert answer.returncode == 0
    document = json.loads((tmp_path / "larger_pictures.json").read_text(encoding="utf-8"))
    own, wide = document["sizes"]
    assert (own["size"], own["seam"], own["images"]) == ("32x32", None, 4)
    assert wide["size"] == "48x32"
    assert wide["seam"] > 0
    assert document["taming"]["images"] == 1
    with Image.open(tmp_path / "sheet-taming-48x32.png") as sheet:
        assert sheet.width >= 48


def test_a_seam_is_a_line_that_is_stronger_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    script = importlib.import_module("larger_pictures")
    steps = np.arange(12).repeat(4)  # every cell is one lighter than the one before
    pixels = np.broadcast_to((10 * steps)[None, :, None], (32, 48, 3)).astype(np.uint8)
    assert script._seam(pixels, 8, 4) == pytest.approx(1)
    darker = pixels.copy()
    darker[:, 32:] += 20  # where the second window's new cells begin
    assert script._seam(darker, 8, 4) == pytest.approx(3)
    assert script._seam(pixels[:, :32], 8, 4) is None
