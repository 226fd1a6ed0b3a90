"""The comparison of codecs: its configs, steps that follow from the minutes, figures and the sheet."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.config.codec import OpenaiDvaeConfig
from engine.config_files import load_run
from engine.metrics.reconstruction import reconstruction_error
from engine.models.openai_dvae import OpenaiDvae
from tests.conftest import DVAE
from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("codec_comparison")


def test_codecs_of_a_set_are_configs_of_the_same_tokens(script: ModuleType) -> None:
    for codecs in script.SETS.values():
        sizes = set()
        for name, (config, changes, shares) in codecs.items():
            settings = script.overrides(changes, shares, 400, pairs=Path("pairs"))
            run: Any = load_run(REPOSITORY / config, [f"{key}={value}" for key, value in settings.items()])
            sizes.add((run.model.image_size, run.model.image_seq_len, run.model.codebook_size))
            assert (run.stage == "dvae") == (name == "dVAE")
            if name == "VQ-VAE":
                assert (run.loss.pixel, run.loss.perceptual, run.loss.disc_weight) == ("l2", "none", 0)
            if name == "VQGAN":
                assert (run.loss.perceptual, run.loss.disc_start) == ("efficientnet-lite0", 240)
                assert run.loss.disc_weight > 0
        assert len(sizes) == 1
        assert list(codecs) == ["dVAE", "VQ-VAE", "VQGAN"]


def test_steps_follow_from_the_minutes(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of 10 s and steps of half a second: two minutes are 220 steps. An interrupted training keeps its steps."""
    trained: list[tuple[str, int]] = []

    def train(run: Path, _: Path, settings: dict[str, str]) -> float:
        steps = int(settings["loop.steps"])
        trained.append((run.name, steps))
        if run.name == "run" and len(trained) == 3:
            raise SystemExit("stopped")
        return 10 + 0.5 * steps

    monkeypatch.setattr(script, "_train", train)
    arguments: tuple[Any, ...] = (tmp_path, Path("config"), {}, {})
    with pytest.raises(SystemExit):
        script.train_for(*arguments, pairs=tmp_path, minutes=2.0)
    row = script.train_for(*arguments, pairs=tmp_path, minutes=5.0)
    few, many = script.CALIBRATION_STEPS
    whole = ("run", 220)
    assert trained == [(f"calibration-{few}", few), (f"calibration-{many}", many), whole, whole]
    assert (row["steps"], row["training_images"]) == (220, 220 * script.BATCH)
    assert row["processor_minutes"] == pytest.approx(2.0)
    assert script.train_for(*arguments, pairs=tmp_path, minutes=2.0) == row
    assert len(trained) == 4


def test_figures_and_sheet(script: ModuleType, pairs_folder: Path) -> None:
    torch.manual_seed(0)
    codec = OpenaiDvae(OpenaiDvaeConfig(**DVAE)).eval()
    row = script.measured(codec, pairs_folder)
    found = reconstruction_error(codec, script._held_out(codec, pairs_folder))
    assert {name: row[name] for name in found} == found
    assert 0 <= row["sharpness"] < 1  # random weights paint nothing
    assert row["feature_distance"] > 0
    assert row["codes_in_use"] == round(32 * found["codebook_used"])
    sheet = script._sheet({"a": codec, "b": codec}, pairs_folder)
    assert sheet.width == 6 * (64 + 4) + 4  # the six held-out images, twice as large
    document = {"set": "s", "pairs": "p", "codecs": {"a": {"processor_minutes": 1.0, "steps": 2, **row}}}
    assert "1.0" in script._table(document)
