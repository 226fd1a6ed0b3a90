"""Nearest photographs by hand, and each distance beside its floor."""

import pytest
import torch

from engine.metrics.distances import PhotographFeatures, nearest, nearest_report, set_distances


def features(count: int, *, seed: int = 0, width: int = 12) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def photographs() -> PhotographFeatures:
    """300 held-out and 400 training photographs; the codec moves each by 0.1 in one direction."""
    held, training = features(300, seed=1), features(400, seed=2)
    moved = torch.zeros(12)
    moved[0] = 0.1
    return PhotographFeatures(held, held + moved, training, training[100:400] + moved, tuple(range(100, 400)))


def test_nearest_equals_the_plain_search() -> None:
    some, to = features(1500), features(40, seed=1)
    distances, numbers = nearest(some, to)
    plain = (some[:, None] - to).square().sum(dim=-1).sqrt()
    assert torch.equal(numbers, plain.argmin(dim=1))
    assert torch.allclose(distances, plain.min(dim=1).values, atol=1e-5)
    assert nearest(to, to)[0].max() == 0


def test_copies_stand_out(photographs: PhotographFeatures) -> None:
    copies = photographs.training[:3] + 0.001
    fresh = features(5, seed=9)
    report, numbers = nearest_report(photographs, torch.cat([copies, fresh]))
    assert numbers[:3] == [0, 1, 2]
    assert report["as_near_as_copies"] == 3
    assert report["reconstructed_training_images"]["median"] == pytest.approx(0.1, abs=1e-4)
    assert report["generations"]["least"] == pytest.approx(0.001 * 12**0.5, abs=1e-4)
    assert report["held_out"]["least"] > 0.5
    assert len(report["distances"]) == 8
    none, _ = nearest_report(photographs, fresh)
    assert none["as_near_as_copies"] == 0


def test_distances_stand_beside_their_floors(photographs: PhotographFeatures) -> None:
    generated = features(300, seed=3) + 1
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
