"""Precision and recall against loops over pairs, torch-fidelity's own code, and sets whose answer is known."""

import pytest
import torch
from torch import Tensor

from engine.metrics.features import ImageFeatures
from engine.metrics.fid import feature_distances
from engine.metrics.precision_recall import LEAST_FOR_PRECISION, precision_recall
from tests.engine.metrics.feature_sets import normal, of, published_case


def by_loops(real: Tensor, other: Tensor, neighbour: int) -> tuple[float, float]:
    def share(points: Tensor, centres: Tensor) -> float:
        inside = 0
        for point in points:
            for centre in centres:
                radius = sorted(float((centre - each).norm()) for each in centres)[neighbour]
                if float((point - centre).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return share(other, real), share(real, other)


def test_equals_the_loops() -> None:
    real, other = normal(24, width=3).double(), normal(19, seed=1, width=3).double() * 1.2 + 1
    for neighbour in (1, 3):
        found = precision_recall(of(real), of(other), neighbour=neighbour)
        assert found == pytest.approx(by_loops(real, other, neighbour))
        assert min(found) > 0
        assert max(found) < 1


def test_equals_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_recall(*published_case()) == pytest.approx((0.9230769276618958, 0.3933333456516266), abs=1e-6)
    monkeypatch.setattr("engine.metrics.precision_recall._AT_ONCE", 77)
    assert precision_recall(*published_case()) == pytest.approx((0.9230769276618958, 0.3933333456516266), abs=1e-6)


def test_modes_that_are_missing_cost_recall_and_modes_that_are_none_cost_precision() -> None:
    left, right = normal(60, seed=1) / 10, normal(60, seed=2) / 10 + 5
    both: ImageFeatures = of(torch.cat([left, right]))
    half = of(normal(60, seed=3) / 10)
    precision, recall = precision_recall(both, half)
    assert precision > 0.7
    assert recall == pytest.approx(0.4, abs=0.1)
    assert precision_recall(half, both)[0] == recall  # the sets change places
    assert precision_recall(both, of(normal(60) + 50)) == (0, 0)
    assert precision_recall(both, both) == (1, 1)


def test_few_images_have_none() -> None:
    found = feature_distances(of(normal(60)), of(normal(LEAST_FOR_PRECISION - 1)))
    assert found["precision_lite0_features"] is found["recall_lite0_features"] is None
