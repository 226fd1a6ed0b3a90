"""Distances of feature sets against what they are by definition, and against torch-fidelity's own code."""

import pytest
import torch

from engine.errors import InputError
from engine.metrics.features import FeatureNetwork, ImageFeatures, joined
from engine.metrics.fid import LEAST_FOR_FID, LEAST_FOR_KID, feature_distances
from tests.engine.metrics.feature_sets import NETWORK, normal, of, published_case


def features(count: int, *, seed: int = 0) -> ImageFeatures:
    return of(normal(count, seed=seed) * torch.arange(1, 13) / 4)


def test_equal_sets_are_at_no_distance() -> None:
    found = feature_distances(features(300), features(300))
    assert found["fid_lite0_features"] == pytest.approx(0, abs=1e-4)
    alike = feature_distances(features(400), features(400, seed=1))  # KID is for independent samples
    assert abs(alike["kid_lite0_features"]) < 2 * alike["kid_lite0_features_std"]
    assert (found["num_real"], found["num_other"], found["num_features"]) == (300, 300, 12)


def test_a_shift_is_worth_its_squared_length() -> None:
    shift = torch.arange(12) / 5
    found = feature_distances(features(300), of(features(300).values + shift))
    assert found["fid_lite0_features"] == pytest.approx(float(shift.square().sum()), rel=1e-4)


def test_fid_of_two_gaussians_by_the_formula() -> None:
    real, other = features(400).values.double(), features(300, seed=1).values.double() * 2 + 1
    means, covariances = [f.mean(0) for f in (real, other)], [f.T.cov() for f in (real, other)]
    # tr sqrt(C C') through symmetric square roots: another way than torchmetrics' eigenvalues of the product
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * middle
    assert feature_distances(of(real), of(other))["fid_lite0_features"] == pytest.approx(float(expected), rel=1e-6)


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


def test_fid_of_the_stored_features_is_torch_fidelitys() -> None:
    found = feature_distances(*published_case())
    assert found["fid_lite0_features"] == pytest.approx(0.4996507159305601, rel=1e-6)


def test_fid_of_known_gaussians_is_the_closed_form() -> None:
    """Samples with exact moments, diagonal covariances: |m - m'|^2 + sum (s - s')^2."""
    whitened = normal(400, seed=3).double()
    whitened -= whitened.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(whitened.T.cov()), whitened.T, upper=False).T
    deviations, others = torch.linspace(0.5, 2, 12), torch.linspace(1, 3, 12)
    found = feature_distances(of(whitened * deviations), of(whitened.flip(0) * others + 0.25))
    closed = 12 * 0.25**2 + float((deviations - others).square().sum())
    assert found["fid_lite0_features"] == pytest.approx(closed, rel=1e-6)


def test_features_of_two_networks_are_refused() -> None:
    other = FeatureNetwork("inception", "another", NETWORK.weights)
    same_name = FeatureNetwork(NETWORK.name, NETWORK.title, "1" * 64)  # of other weights
    for network in (other, same_name):
        mixed = ImageFeatures(normal(60), network)
        with pytest.raises(InputError, match="cannot be compared: compute both sets with one network"):
            feature_distances(features(60), mixed)
        with pytest.raises(InputError, match="cannot be compared"):
            joined([features(60), mixed])
    named = feature_distances(ImageFeatures(normal(60), other), ImageFeatures(normal(60, seed=1), other))
    assert {"fid_inception_features", "kid_inception_features", "precision_inception_features"} < set(named)
    assert not any("lite0" in name for name in named)
