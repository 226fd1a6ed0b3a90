"""Captions in places: shared, counted, given up, refused."""

import pytest
import torch

from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.kv_cache import Caption, Prefix, empty_prefix
from engine.errors import InputError

L, P, H, D, C = 2, 3, 2, 4, 8
CPU = torch.device("cpu")


def _prefix(num_captions: int, seed: int) -> Prefix:
    torch.manual_seed(seed)
    prefix = empty_prefix(L, num_captions, P, H, D, C, dtype=torch.float32, device=CPU)
    for tensor in (prefix.keys, prefix.values, prefix.hidden):
        tensor.normal_()
    return prefix


def _pool(num_captions: int, null_prefix: Prefix | None = None) -> PrefixPool:
    return PrefixPool(num_captions, (L, P, H, D), null_prefix=null_prefix, dtype=torch.float32, device=CPU)


def _holds(pool: PrefixPool, place: int, caption: Caption) -> bool:
    keys, values = caption.prefix.keys[:, caption.index], caption.prefix.values[:, caption.index]
    return all(
        torch.equal(pool.keys(layer)[place], keys[layer]) and torch.equal(pool.values(layer)[place], values[layer])
        for layer in range(L)
    )


def test_captions_are_copied_once_and_shared() -> None:
    prefix, pool = _prefix(2, seed=0), _pool(2)
    first = pool.hold(Caption(prefix, 0))
    assert pool.hold(Caption(prefix, 0)) == first
    assert pool.num_free == 1
    second = pool.hold(Caption(prefix, 1))
    assert second != first
    assert _holds(pool, first, Caption(prefix, 0))
    assert _holds(pool, second, Caption(prefix, 1))
    assert pool.keys(0).shape == (3, P, H, D)


def test_a_place_is_free_when_its_last_holder_lets_go() -> None:
    prefix, pool = _prefix(2, seed=0), _pool(1)
    place = pool.hold(Caption(prefix, 0))
    pool.hold(Caption(prefix, 0))
    pool.release(Caption(prefix, 0))
    with pytest.raises(InputError, match="captions: 1"):
        pool.hold(Caption(prefix, 1))
    pool.release(Caption(prefix, 0))
    assert pool.hold(Caption(prefix, 1)) == place
    assert _holds(pool, place, Caption(prefix, 1))


def test_captions_of_different_prefixes_are_different() -> None:
    one, other, pool = _prefix(1, seed=0), _prefix(1, seed=1), _pool(2)
    assert pool.hold(Caption(one, 0)) != pool.hold(Caption(other, 0))


def test_the_empty_caption_stays_in_place_0() -> None:
    null, prefix = _prefix(1, seed=0), _prefix(1, seed=1)
    pool = _pool(1, null)
    for _ in range(3):
        assert pool.hold(Caption(null, 0)) == 0
        pool.release(Caption(null, 0))
    assert pool.num_free == 1
    assert pool.hold(Caption(prefix, 0)) == 1
    assert _holds(pool, 0, Caption(null, 0))
