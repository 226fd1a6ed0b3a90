"""Nearest photographs by hand, and each distance beside its floor."""

import pytest
import torch

from engine.metrics.distances import (
    PhotographFeatures,
    inception_scores,
    nearest,
    nearest_report,
    reconstruction_distances,
    set_distances,
)
from engine.metrics.features import ImageFeatures
from tests.engine.metrics.feature_sets import normal as features
from tests.engine.metrics.feature_sets import of


@pytest.fixture
def photographs() -> PhotographFeatures:
    """300 held-out and 400 training photographs; the codec moves each by 0.1 in one direction."""
    held, training = features(300, seed=1), features(400, seed=2)
    moved = torch.zeros(12)
    moved[0] = 0.1
    return PhotographFeatures(
        of(held), of(held + moved), of(training), of(training[100:400] + moved), tuple(range(100, 400))
    )


def test_nearest_equals_the_plain_search() -> None:
    some, to = features(1500), features(40, seed=1)
    distances, numbers = nearest(some, to)
    plain = (some[:, None] - to).square().sum(dim=-1).sqrt()
    assert torch.equal(numbers, plain.argmin(dim=1))
    assert torch.allclose(distances, plain.min(dim=1).values, atol=1e-5)
    assert nearest(to, to)[0].max() == 0


def test_copies_stand_out(photographs: PhotographFeatures) -> None:
    copies = photographs.training.values[:3] + 0.001
    fresh = features(5, seed=9)
    report, numbers = nearest_report(photographs, of(torch.cat([copies, fresh])))
    assert numbers[:3] == [0, 1, 2]
    assert report["as_near_as_copies"] == 3
    assert report["reconstructed_training_images"]["median"] == pytest.approx(0.1, abs=1e-4)
    assert report["generations"]["least"] == pytest.approx(0.001 * 12**0.5, abs=1e-4)
    assert report["held_out"]["least"] > 0.5
    assert len(report["distances"]) == 8
    none, _ = nearest_report(photographs, of(fresh))
    assert none["as_near_as_copies"] == 0


def test_distances_stand_beside_their_floors(photographs: PhotographFeatures) -> None:
    generated = of(features(300, seed=3) + 1)
    found = set_distances(photographs, generated, seed=0)
    to_held_out = found["to_held_out"]
    assert list(to_held_out) == [
        "generations", "reconstructed_held_out", "training_images", "reconstructed_training_images",
    ]  # fmt: skip
    fid = {name: row["fid_lite0_features"] for name, row in to_held_out.items()}
    assert fid["reconstructed_held_out"] == pytest.approx(0.01, abs=1e-4)  # a shift, squared
    assert fid["training_images"] < fid["generations"] / 10
    assert to_held_out["training_images"]["num_other"] == 300
    to_training = found["to_training"]
    assert (to_training["generations"]["num_real"], to_training["held_out"]["num_other"]) == (400, 300)
    assert to_training["held_out"]["fid_lite0_features"] < to_training["generations"]["fid_lite0_features"] / 10
    assert to_held_out["reconstructed_held_out"]["precision_lite0_features"] > 0.9
    assert to_held_out["generations"]["recall_lite0_features"] < to_held_out["training_images"]["recall_lite0_features"]


def test_reconstructions_stand_beside_their_own_photographs(photographs: PhotographFeatures) -> None:
    found = reconstruction_distances(photographs, seed=0)
    assert {name: row["num_other"] for name, row in found.items()} == {"held_out": 300, "training_images": 300}
    for row in found.values():
        assert row["fid_lite0_features"] == pytest.approx(0.01, abs=1e-4)  # each moved by 0.1 in one direction


def test_inception_scores_are_of_equally_many_images(photographs: PhotographFeatures) -> None:
    class Encoder:
        """Logits that are the features."""

        def class_logits(self, features: ImageFeatures) -> torch.Tensor:
            return features.values

    found = inception_scores(Encoder(), photographs, of(torch.zeros(300, 12)))  # type: ignore[arg-type]
    assert found["generations"]["mean"] == pytest.approx(1)  # all alike
    assert found["training_images"]["mean"] > 1.2
    assert {name: row["images"] for name, row in found.items()} == {
        "generations": 300, "training_images": 300, "reconstructed_training_images": 300, "held_out": 300,
        "reconstructed_held_out": 300,
    }  # fmt: skip
