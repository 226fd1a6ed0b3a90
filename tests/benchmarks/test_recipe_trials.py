"""Trials of the transformer's recipe: each variant is a config that trains, and what is read from the runs' logs."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from engine.config_files import load_run
from tests.benchmark_scripts import run_script
from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("recipe_trials")


def test_every_variant_is_a_config_that_differs_from_plain(script: ModuleType) -> None:
    runs = set()
    for changes in script.VARIANTS.values():
        overrides = [f"{name}={value}" for name, value in (script.PLAIN | changes).items()]
        run = load_run(REPOSITORY / "configs/clothing/kodalle.yaml", overrides)
        runs.add(run.model_dump_json())
    assert len(runs) == len(script.VARIANTS)


def test_steps_to_a_loss_lie_between_validations(script: ModuleType) -> None:
    curve = [(20, 5.0), (40, 4.0), (60, 4.5), (80, 3.0)]
    assert [script.steps_to(curve, loss) for loss in (6.0, 4.5, 4.0, 3.5, 2.0)] == [20, 30, 40, 80 - 20 / 3, None]


def test_ended_runs_are_read_again(tmp_path: Path) -> None:
    curves = {"plain-1": [5, 4.0], "muon-1": [4.0, 3.5], "plain-2": [5, 4.2], "muon-2": [5, 4.0]}
    for name, losses in curves.items():
        (tmp_path / name).mkdir()
        rows = [{"step": 20 * (i + 1), "validation_loss_image": loss} for i, loss in enumerate(losses)]
        lines = [{"step": 1, "loss": 9.0}, *rows]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = run_script(
        "recipe_trials", str(REPOSITORY / "configs/clothing/kodalle.yaml"), "--steps", "40", "--variants", "plain", "muon",
        "--runs", str(tmp_path), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert answer.returncode == 0
    document = json.loads((tmp_path / "out" / "clothing-40.json").read_text())
    assert document["variants"]["muon"] == {
        "seeds": 2, "held_out_loss": 3.75, "least": 3.5, "most": 4.0,
        "steps_to_plain": pytest.approx((0.5 + (20 + 20 * 0.8) / 40) / 2),
    }  # fmt: skip
    assert document["variants"]["plain"]["steps_to_plain"] == 1
    assert "muon" in answer.stdout
