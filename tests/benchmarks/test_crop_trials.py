"""The comparison of crops: every variant is a config whose crops have room, and differences are between the same images."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engine.config_files import load_run
from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("crop_trials")


def test_variants_differ_in_their_views_alone(script: ModuleType, tmp_path: Path) -> None:
    arguments = Namespace(steps=300, image_size=64, pairs=Path("data/clothing128"))
    views, others = [], []
    for variant in script.VARIANTS:
        settings = script.overrides(arguments, variant, 2, tmp_path)
        values = [f"{name}={value}" for name, value in settings.items()]
        run: Any = load_run(REPOSITORY / "configs/clothing/kodalle-bpe.yaml", values)
        views.append((run.augmented_views, run.augment_shift, run.data.crop))
        others.append(run.model_dump(exclude={"augmented_views": True, "augment_shift": True, "data": {"crop"}}))
    assert views == [(0, 0, None), (3, 4, None), (3, 0, "dalle"), (3, 0, "dalle-prototype")]
    assert all(other == others[0] for other in others)
    assert (others[0]["loop"]["steps"], others[0]["seed"]) == (300, 2)


def test_differences_are_between_the_same_images(script: ModuleType) -> None:
    plain = torch.tensor([3.0, 4.0, 8.0])
    losses = {"none": [plain, plain + 2], "dalle": [plain + torch.tensor([0.1, 0.2, 0.3]), plain + 2]}
    found = script.summary(losses)
    assert found["none"]["minus_none"] == found["none"]["standard_error"] == 0
    assert found["dalle"]["minus_none"] == pytest.approx(0.1)
    assert found["dalle"]["standard_error"] == pytest.approx(0.05 / 3**0.5, rel=1e-4)
    assert found["dalle"]["by_seed"] == pytest.approx([5.2, 7.0])
