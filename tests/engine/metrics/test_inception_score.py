"""The Inception Score against plain loops, torch-fidelity's own code, and sets whose score is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.metrics.inception_score import LEAST_IN_SPLIT, SPLITS, inception_score


def logits(count: int, classes: int = 7) -> Tensor:
    return torch.from_numpy(np.random.RandomState(2).random_sample((count, classes)) * 8)


def test_equals_the_loops() -> None:
    rows = logits(20).tolist()
    probabilities = [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in rows]
    marginal = [sum(row[k] for row in probabilities) / len(rows) for k in range(7)]
    divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in probabilities]
    assert inception_score(logits(20))["mean"] == pytest.approx(math.exp(sum(divergences) / 20))


def test_equals_torch_fidelity() -> None:
    found = inception_score(logits(103), splits=10)
    assert found["mean"] == pytest.approx(2.1767384573961874, rel=1e-12)
    assert found["std"] == pytest.approx(0.2301378796548972, rel=1e-10)
    whole = inception_score(logits(103))
    assert whole == {"images": 103, "splits": 1, "mean": pytest.approx(2.4841329981512104, rel=1e-12), "std": None}


def test_known_scores() -> None:
    sure = torch.eye(5).repeat(8, 1) * 200  # each of five classes, certain
    assert inception_score(sure)["mean"] == pytest.approx(5)
    assert inception_score(sure[:1].expand(40, -1))["mean"] == pytest.approx(1)  # one class alone
    assert inception_score(torch.zeros(40, 5))["mean"] == pytest.approx(1)  # certain of nothing


def test_splits_follow_the_number_of_images() -> None:
    least = SPLITS * LEAST_IN_SPLIT
    assert inception_score(torch.zeros(least - 1, 2))["splits"] == 1
    assert inception_score(torch.zeros(least, 2))["splits"] == 10


def test_no_trace_is_left_in_the_global_generators() -> None:
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # type: ignore[index]
    inception_score(logits(30), splits=3)
    assert np.array_equal(before[0], np.random.get_state()[1])  # type: ignore[index]
    assert torch.equal(before[1], torch.random.get_rng_state())
