"""Order annealing: which orders a batch is trained in, as a function of seed, visit and step."""

import numpy as np
import pytest
import torch

from engine.config.stages import OrderAnnealingConfig
from engine.data.order import BatchOrder
from engine.data.token_shards import TokenShard
from engine.training.batches import Batch, token_source
from engine.training.order_annealing import batch_orders


def _batch(number: int, *, size: int = 400, world_size: int = 1, rank: int = 0, random_orders: bool = True) -> Batch:
    shard = TokenShard(np.arange(9, dtype=np.uint16).reshape(1, 1, 9), np.full((1, 3), 9, np.int32), np.array([0, 1]))
    order = BatchOrder(1, size // world_size, seed=5, rank=rank, world_size=world_size)
    return token_source(
        shard, order, empty=torch.tensor([[0, 2, 1]]), caption_dropout=0.5, input_token_noise=0.5, image_vocab_size=9,
        random_orders=random_orders,
    )(number)  # fmt: skip


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.49, 1.0), (0.5, 1.0), (0.625, 0.5), (0.75, 0.0), (1.0, 0.0)]
)
def test_the_share_of_random_orders_falls_between_two_fractions_of_the_steps(progress: float, share: float) -> None:
    assert OrderAnnealingConfig().random_share(progress) == pytest.approx(share)


def test_a_sudden_end_and_no_random_part_at_all() -> None:
    assert [OrderAnnealingConfig(start=0.5, end=0.5).random_share(p) for p in (0.4, 0.5, 1.0)] == [1, 0, 0]
    assert OrderAnnealingConfig(start=0, end=0).random_share(0.0) == 0


def test_orders_are_permutations_of_which_the_step_decides_how_many_are_random() -> None:
    batch, annealing, raster = _batch(0), OrderAnnealingConfig(), torch.arange(9)
    counts = []
    for step in (0, 50, 60, 70, 74):
        orders = batch_orders(batch, annealing, step=step, total_steps=100)
        assert orders is not None
        assert torch.equal(orders.sort(dim=1).values, raster.expand(400, -1))
        counts.append(int((orders != raster).any(dim=1).sum()))
    assert counts[0] == counts[1] == 400
    assert counts[2] == pytest.approx(240, abs=40)
    assert counts[3] == pytest.approx(80, abs=30)
    assert 0 < counts[4] < 40
    assert batch_orders(batch, annealing, step=75, total_steps=100) is None


def test_a_sequence_that_is_random_late_was_random_in_the_same_order_early() -> None:
    """Nothing but the step decides: no generator moves on between steps."""
    batch, annealing = _batch(3), OrderAnnealingConfig()
    early, late = (batch_orders(batch, annealing, step=step, total_steps=100) for step in (10, 65))
    assert early is not None
    assert late is not None
    is_random = (late != torch.arange(9)).any(dim=1)
    assert is_random.any()
    assert not is_random.all()
    assert torch.equal(early[is_random], late[is_random])


def test_orders_are_anew_at_each_visit_and_the_same_for_any_number_of_ranks() -> None:
    one, two = _batch(0, size=8), _batch(1, size=8)
    assert not torch.equal(one["random_orders"], two["random_orders"])
    halves = [_batch(0, size=8, world_size=2, rank=rank) for rank in (0, 1)]
    for name, whole in one.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), whole), name


def test_orders_leave_the_rest_of_a_batch_as_it_is_without() -> None:
    with_orders, without = _batch(2), _batch(2, random_orders=False)
    assert with_orders.keys() - without.keys() == {"random_orders", "order_draws"}
    assert all(torch.equal(with_orders[name], without[name]) for name in without)
