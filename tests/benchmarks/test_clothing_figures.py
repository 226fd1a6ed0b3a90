"""Figures of a model of clothes: what a report states, and what it lacks."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from tests.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "clothing_figures.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        specification = importlib.util.spec_from_file_location("clothing_figures", SCRIPT)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules["clothing_figures"] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


def shares(top: float, random: float) -> dict[str, Any]:
    return {
        "top_ranked": top, "random": random, "real": 0.9, "top_ranked_minus_random": top - random, "num_captions": 100,
    }  # fmt: skip


def fid(number: float) -> dict[str, Any]:
    return {"fid_lite0_features": number, "num_other": 2000}


WHOLE = {
    "reconstruction": {"images": 273, "psnr_db": 26.1},
    "koclip": {"pairs": 273, "recall_at_1": 0.45, "recall_at_5": 0.70, "recall_among": 100},
    "independent_classifier": {"images": 273, "accuracy": 0.88, "majority": 0.4},
    "generations": {
        "colour_agreement": shares(0.96, 0.8), "class_agreement": shares(0.87, 0.8),
        "colour_and_class_agreement": shares(0.75, 0.7),
        "distances": {
            "to_held_out": {
                "generations": fid(60.0), "reconstructed_held_out": fid(30.0), "reconstructed_training_images": fid(50.0),
            },
            "to_training": {"generations": fid(42.0), "reconstructed_held_out": fid(30.0)},
        },
        "nearest": {"distances": [1.0] * 40, "as_near_as_copies": 0},
    },
}  # fmt: skip
PARTIAL = {"generations": {"class_agreement": shares(0.91, 0.8)}}


def test_figures_stand_beside_their_bars(script: ModuleType) -> None:
    found = [(figure.value, figure.reached) for figure in script.figures(WHOLE, PARTIAL)]
    assert found == [
        (0.45, "bar"), (0.70, "missed"), (0.88, "bar"), (0.96, "stretch"), (0.87, "bar"), (0.75, "stored"),
        (pytest.approx(0.05), "missed"), (0.91, "bar"), (26.1, "bar"), (2.0, "missed"), (1.2, "stored"),
        (pytest.approx(1.4), "stretch"), (0, "stored"),
    ]  # fmt: skip
    kept = {figure.what: figure for figure in script.figures(WHOLE, PARTIAL)}
    recall = kept["KoCLIP: right caption among five"]
    assert (recall.random, recall.of) == (0.05, "273 photographs, among 100 captions")


def test_what_a_report_lacks_is_not_measured(script: ModuleType) -> None:
    """A classifier left out, no KoCLIP, no distances: no figure of these, and none lost."""
    found = script.figures({"generations": {"colour_agreement": shares(0.5, 0.5)}}, {"generations": {}})
    assert len(found) == len(script.figures(WHOLE, PARTIAL))
    measured = {figure.what: figure.reached for figure in found if figure.value is not None}
    assert measured == {"colour read from the pixels is that of the caption, top-ranked": "missed"}
    assert {figure.reached for figure in found if figure.value is None} == {"not measured"}
