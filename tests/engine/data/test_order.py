"""The order of images: a function of (seed, position), equal for any number of ranks."""

from collections import Counter

import numpy as np
import pytest

from engine.data.order import BatchOrder


def _indices(order: BatchOrder, steps: range) -> list[list[int]]:
    return [[order.index(position) for position in order.positions(step)] for step in steps]


def test_resumed_equals_from_scratch() -> None:
    whole = _indices(BatchOrder(10, 4, seed=1), range(12))
    assert _indices(BatchOrder(10, 4, seed=1), range(7, 12)) == whole[7:]
    backwards = BatchOrder(10, 4, seed=1)
    assert [_indices(backwards, range(step, step + 1))[0] for step in reversed(range(12))] == whole[::-1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("weights", [None, [1.0 + number % 3 for number in range(10)]])
def test_ranks_share_the_global_batch(world_size: int, weights: list[float] | None) -> None:
    alone = BatchOrder(10, 12, seed=5, weights=weights)
    ranks = [
        BatchOrder(10, 12 // world_size, seed=5, rank=rank, world_size=world_size, weights=weights)
        for rank in range(world_size)
    ]
    for step in range(6):
        together = [index for order in ranks for index in _indices(order, range(step, step + 1))[0]]
        assert together == _indices(alone, range(step, step + 1))[0]


def test_each_epoch_is_another_permutation() -> None:
    order = BatchOrder(50, 1, seed=0)
    epochs = [[order.index(epoch * 50 + place) for place in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [BatchOrder(50, 1, seed=1).index(place) for place in range(50)] != epochs[0]


def test_weights_are_frequencies() -> None:
    weights = [1.0, 3.0, 6.0, 0.0]
    order = BatchOrder(4, 1, seed=0, weights=weights)
    samples = 8000
    counts = Counter(order.index(position) for position in range(samples))
    assert counts[3] == 0
    expected = [samples * weight / 10 for weight in weights[:3]]
    chi_square = sum((counts[index] - mean) ** 2 / mean for index, mean in enumerate(expected))
    assert chi_square < 13.8  # p = 0.001 at 2 degrees of freedom


def test_randomness_of_a_visit_depends_on_seed_and_position_alone() -> None:
    order = BatchOrder(10, 4, seed=1)
    first = order.generator(3).random(4)
    order.index(99)
    assert np.array_equal(BatchOrder(7, 2, seed=1, rank=1, world_size=2).generator(3).random(4), first)
    assert not np.array_equal(order.generator(4).random(4), first)
    assert not np.array_equal(BatchOrder(10, 4, seed=2).generator(3).random(4), first)


@pytest.mark.parametrize("offset", [0, 2**63])
def test_neighbouring_visits_differ_also_in_the_second_stream(offset: int) -> None:
    """The caption's stream is the visit's, 2**63 further on: as floats, such keys would be equal by the thousand."""
    order = BatchOrder(10, 4, seed=1)
    samples = [order.generator(position + offset).random() for position in range(200)]
    assert len(set(samples)) == 200
    assert abs(np.mean(samples) - 0.5) < 0.1


def test_a_batch_may_be_larger_than_the_set() -> None:
    indices = _indices(BatchOrder(3, 7, seed=0), range(1))[0]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
