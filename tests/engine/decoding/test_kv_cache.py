"""The KV cache: plain attention over prefix and own positions, the same bits in any window."""

import pytest
import torch

from engine.decoding.kv_cache import KVCache, Prefix, PrefixRef
from engine.decoding.sampler import Sampler
from kernels import reference
from tests.engine.decoding.cases import TEXT, random_model

CPU = torch.device("cpu")


def _cache(prefix: Prefix, captions: list[int], num_positions: int) -> KVCache:
    L, _, P, H, D = prefix.keys.shape
    cache = KVCache(len(captions), num_positions, (L, P, H, D), dtype=torch.float32, device=CPU)
    cache.set_prefixes({row: PrefixRef(prefix, caption) for row, caption in enumerate(captions)})
    return cache


def test_a_caption_is_held_once() -> None:
    prefix = Sampler(random_model()).prefill(TEXT)
    assert prefix.keys.shape == (3, 3, 9, 2, 16)  # (L, G, P, H, D)
    cache = _cache(prefix, [0] * 10 + [2], 5)
    assert sum(len(group.queries) for group in cache._siblings) == 2


@pytest.mark.parametrize("lengths", [[4] * 8, [1, 100, 64, 65, 63, 128, 3, 2]])
def test_cached_attention_equals_plain_attention_in_any_order(lengths: list[int]) -> None:
    prefix = Sampler(random_model()).prefill(TEXT)
    captions = [2, 0, 2, 1, 0, 2, 2, 2]
    cache = _cache(prefix, captions, 130)
    torch.manual_seed(0)
    qkv = torch.randn(128, 8, 3, 2, 16)
    for position in range(max(lengths)):
        cache.begin_step(torch.full((8,), position), position)
        cache.append_and_attend(2, qkv[position, :, None])
    q = torch.randn(8, 2, 16)
    last = torch.tensor(lengths) - 1  # what each sequence appends again, with a new query
    cache.begin_step(last, max(lengths) - 1)
    queried = torch.cat([q[:, None] * 16**-0.5, qkv[last, torch.arange(8), 1:]], dim=1)  # (8, 3, H, D)
    attended = cache.append_and_attend(2, queried[:, None])[:, 0]
    own_k, own_v = qkv.transpose(0, 1)[:, :, 1:].unbind(2)  # (sequences, positions, H, D)
    for row, (caption, length) in enumerate(zip(captions, lengths, strict=True)):
        k = torch.cat([prefix.keys[2, caption], own_k[row, :length]])[None]
        v = torch.cat([prefix.values[2, caption], own_v[row, :length]])[None]
        expected = reference.attention(q[row, None, None], k, v, causal=True)[0, 0]
        torch.testing.assert_close(attended[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [3, 16])
def test_a_position_has_the_same_bits_in_any_window(window: int, dtype: torch.dtype) -> None:
    """The same queries, keys and values through both caches, at different lengths, wrong guesses overwritten."""
    L, R, P, H, D, N = 2, 3, 9, 2, 16, 72
    torch.manual_seed(0)
    keys, values = torch.randn(2, L, 3, P, H, D, dtype=dtype)
    prefix = Prefix(keys, values, torch.zeros(3, H * D, dtype=dtype))
    refs = {0: PrefixRef(prefix, 0), 1: PrefixRef(prefix, 2), 2: PrefixRef(prefix, 0)}
    single = KVCache(R, N, (L, P, H, D), dtype=dtype, device=CPU)
    windows = KVCache(R, N, (L, P, H, D), window=window, dtype=dtype, device=CPU)
    single.set_prefixes(refs)
    windows.set_prefixes(refs)
    qkv = torch.randn(R, N + window, 3, H, D, dtype=dtype)
    expected = torch.empty(R, N, H, D, dtype=dtype)
    for position in range(N):
        single.begin_step(torch.full((R,), position), position)
        expected[:, position] = single.append_and_attend(1, qkv[:, position, None])[:, 0]
    lengths = torch.zeros(R, dtype=torch.int64)
    accepted = torch.tensor([1, max(window // 2, 1), window])  # half of the second one's positions come twice
    while (lengths < N).any():
        at = lengths[:, None] + torch.arange(window)  # (R, w)
        windows.begin_step(lengths, int(lengths.max()))
        wrong = torch.randn_like(qkv[:, :window])  # what is not accepted is random, overwritten by the next pass
        is_right = (torch.arange(window) < accepted[:, None])[:, :, None, None, None]
        fed = torch.where(
            is_right, qkv.gather(1, at.clamp(max=N)[:, :, None, None, None].expand(-1, -1, 3, H, D)), wrong
        )
        attended = windows.append_and_attend(1, fed)
        for row in range(R):
            for offset in range(int(accepted[row])):
                if at[row, offset] < N:
                    assert torch.equal(attended[row, offset], expected[row, at[row, offset]]), (row, at[row, offset])
        lengths = torch.where(lengths < N, lengths + accepted, lengths).clamp(max=N)


@pytest.mark.parametrize("prefix_len", [1, 5, 9, 15])
def test_short_prefixes_have_the_same_bits_in_any_window(prefix_len: int) -> None:
    """A class is a prefix of one position: such small products take other kernels for other numbers of rows."""
    R, H, D, N = 3, 2, 64, 24
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 1, prefix_len, H, D)
    prefix = Prefix(keys, values, torch.zeros(1, H * D))
    qkv = torch.randn(R, N, 3, H, D)
    single, windows = (KVCache(R, N, (1, prefix_len, H, D), window=w, dtype=torch.float32, device=CPU) for w in (1, 4))
    for cache in (single, windows):
        cache.set_prefixes({sequence: PrefixRef(prefix, 0) for sequence in range(R)})
    for position in range(0, N - 4, 4):
        lengths = torch.full((R,), position)
        windows.begin_step(lengths, position)
        together = windows.append_and_attend(0, qkv[:, position : position + 4])
        for offset in range(4):
            single.begin_step(lengths + offset, position + offset)
            alone = single.append_and_attend(0, qkv[:, position + offset, None])
            assert torch.equal(alone[:, 0], together[:, offset])
