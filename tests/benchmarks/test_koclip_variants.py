"""The comparison of KoCLIP's options: every variant is a config, and what ranking gains by the formula."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from engine.config.stages import KoclipRun
from engine.config_files import load_run
from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("koclip_variants")


def test_every_variant_is_a_config_of_its_own_at_equal_steps(script: ModuleType, tmp_path: Path) -> None:
    arguments = Namespace(steps=150, batch=64, image_size=64, pairs=Path("data/clothing64"), set=[])
    runs = []
    for variant in script.VARIANTS:
        overrides = script._overrides(arguments, variant, 1, tmp_path)
        run = load_run(REPOSITORY / "configs/clothing/koclip.yaml", overrides)
        assert isinstance(run, KoclipRun)
        assert (run.loop.steps, run.codec, run.spliced_negatives, run.model.image_size) == (150, None, 0, 64)
        runs.append(run.model_dump_json())
    assert len(set(runs)) == len(script.VARIANTS)


def test_ranking_gain_equals_its_formula(script: ModuleType) -> None:
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 5.0, 5.0], [1.0, 2.0, 3.0], [1.0, 9.0, 0.0]])
    right = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [-1, -1, -1]])
    found = script.ranking(scores, right)
    assert found["captions"] == 3
    assert found["top_ranked"] == 1  # of two equal scores the first candidate is taken
    assert found["random"] == pytest.approx(4 / 9)
    assert found["gain"] == pytest.approx(5 / 9)
    gains = np.array([2 / 3, 2 / 3, 1 / 3])
    assert found["gain_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(3))
    # right above wrong: 2 of 2; 1 and a half of 2; 1 of 2
    assert found["right_above_wrong"] == pytest.approx(4.5 / 6)


def test_means_over_seeds(script: ModuleType) -> None:
    part = {"gain": 0.1, "right_above_wrong": 0.6}
    runs = [
        {
            "variant": "plain", "minutes": 2.0, "processor_minutes": 1.0,
            "recall": {"recall_at_1": first, "recall_at_5": 0.8}, "ranking": dict.fromkeys(("colour", "class", "both"), part),
        }
        for first in (0.4, 0.5)
    ]  # fmt: skip
    found = script.summary(runs)["plain"]
    assert (found["seeds"], found["recall_at_1"], found["recall_at_1_range"]) == (2, pytest.approx(0.45), [0.4, 0.5])
    assert found["gain_both"] == pytest.approx(0.1)
