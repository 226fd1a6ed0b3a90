"""Captions in entries: shared, counted, released, refused."""

import pytest
import torch

from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.kv_cache import Prefix, PrefixRef, empty_prefix
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


def _holds(pool: PrefixPool, entry: int, ref: PrefixRef) -> bool:
    return all(
        torch.equal(pool.keys(layer)[entry], ref.keys[layer])
        and torch.equal(pool.values(layer)[entry], ref.values[layer])
        for layer in range(L)
    )


def test_captions_are_copied_once_and_shared() -> None:
    prefix, pool = _prefix(2, seed=0), _pool(2)
    first = pool.hold(PrefixRef(prefix, 0))
    assert pool.hold(PrefixRef(prefix, 0)) == first
    assert pool.num_free == 1
    second = pool.hold(PrefixRef(prefix, 1))
    assert second != first
    assert _holds(pool, first, PrefixRef(prefix, 0))
    assert _holds(pool, second, PrefixRef(prefix, 1))
    assert pool.keys(0).shape == (3, P, H, D)


def test_an_entry_is_free_when_its_last_holder_releases_it() -> None:
    prefix, pool = _prefix(2, seed=0), _pool(1)
    entry = pool.hold(PrefixRef(prefix, 0))
    pool.hold(PrefixRef(prefix, 0))
    pool.release(PrefixRef(prefix, 0))
    with pytest.raises(InputError, match="captions: 1"):
        pool.hold(PrefixRef(prefix, 1))
    pool.release(PrefixRef(prefix, 0))
    assert pool.hold(PrefixRef(prefix, 1)) == entry
    assert _holds(pool, entry, PrefixRef(prefix, 1))


def test_captions_of_different_prefixes_are_different() -> None:
    one, other, pool = _prefix(1, seed=0), _prefix(1, seed=1), _pool(2)
    assert pool.hold(PrefixRef(one, 0)) != pool.hold(PrefixRef(other, 0))


def test_the_empty_caption_stays_in_entry_0() -> None:
    null, prefix = _prefix(1, seed=0), _prefix(1, seed=1)
    pool = _pool(1, null)
    for _ in range(3):
        assert pool.hold(PrefixRef(null, 0)) == 0
        pool.release(PrefixRef(null, 0))
    assert pool.num_free == 1
    assert pool.hold(PrefixRef(prefix, 0)) == 1
    assert _holds(pool, 0, PrefixRef(null, 0))
