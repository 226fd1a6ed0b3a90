"""Distances of feature sets against what they are by definition."""

import pytest
import torch

from engine.metrics.fid import LEAST_FOR_FID, LEAST_FOR_KID, feature_distances


def features(count: int, *, seed: int = 0, width: int = 12) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, width + 1) / 4


def test_equal_sets_are_at_no_distance() -> None:
    found = feature_distances(features(300), features(300))
    assert found["fid_lite0_features"] == pytest.approx(0, abs=1e-4)
    alike = feature_distances(features(400), features(400, seed=1))  # KID is for independent samples
    assert abs(alike["kid_lite0_features"]) < 2 * alike["kid_lite0_features_std"]
    assert (found["num_real"], found["num_other"], found["num_features"]) == (300, 300, 12)


def test_a_shift_is_worth_its_squared_length() -> None:
    shift = torch.arange(12) / 5
    found = feature_distances(features(300), features(300) + shift)
    assert found["fid_lite0_features"] == pytest.approx(float(shift.square().sum()), rel=1e-4)


def test_fid_of_two_gaussians_by_the_formula() -> None:
    real, other = features(400).double(), features(300, seed=1).double() * 2 + 1
    means, covariances = [f.mean(0) for f in (real, other)], [f.T.cov() for f in (real, other)]
    # tr sqrt(C C') through symmetric square roots: another way than torchmetrics' eigenvalues of the product
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * middle
    assert feature_distances(real, other)["fid_lite0_features"] == pytest.approx(float(expected), rel=1e-6)


def test_too_few_images_have_no_distance() -> None:
    assert LEAST_FOR_KID < LEAST_FOR_FID
    few = feature_distances(features(300), features(LEAST_FOR_KID - 1))
    assert [few["fid_lite0_features"], few["kid_lite0_features"], few["kid_lite0_features_std"]] == [None] * 3
    some = feature_distances(features(300), features(LEAST_FOR_KID, seed=1))
    assert some["fid_lite0_features"] is None
    assert isinstance(some["kid_lite0_features"], float)
    assert some["kid_lite0_features_std"] > 0


def test_equal_arguments_equal_numbers_and_no_trace_left() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = feature_distances(features(80), features(80, seed=1), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert feature_distances(features(80), features(80, seed=1), seed=3) == first
    assert feature_distances(features(80), features(80, seed=1), seed=4) != first
