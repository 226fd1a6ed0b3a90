"""Patterns over a cache of several splits: the attention of a mask over whole sequences, read from few places."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config.transformer import AttentionPattern, TransformerConfig, dalle_patterns
from engine.decoding.kv_cache import KVCache, Prefix, PrefixRef
from engine.decoding.sampler import Sampler
from engine.models.attention import masked_attention
from engine.models.whole_sequence import pattern_mask
from engine.sampling_params import SamplingParams, SequenceRequest
from tests.engine.decoding.cases import CONFIG, TEXT, random_model

PATTERNS: list[AttentionPattern] = [
    "axial_row", "axial_col", "conv", "conv_symmetric", "dalle_row", "dalle_col", "dalle_conv"
]  # fmt: skip
CPU = torch.device("cpu")
G, P, H, D, R = 12, 9, 2, 16, 3  # 144 cells: three splits
N = G * G


def _cache(pattern: AttentionPattern, prefix: Prefix, *, window: int = 1) -> KVCache:
    cache = KVCache(
        R, N - 1, (1, P, H, D), window=window, patterns=(pattern,), grid_size=G, dtype=torch.float32, device=CPU
    )  # fmt: skip
    cache.set_prefixes({sequence: PrefixRef(prefix, 0) for sequence in range(R)})
    return cache


def _inputs() -> tuple[Prefix, Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 1, P, H, D)
    return Prefix(keys, values, torch.zeros(1, H * D)), torch.randn(R, N, 3, H, D)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_attention_is_that_of_the_mask(pattern: AttentionPattern) -> None:
    """Each sequence at a position of its own."""
    prefix, qkv = _inputs()
    cache = _cache(pattern, prefix)
    behind = torch.tensor([0, 13, 40])
    found = torch.zeros(R, N, H, D)
    for step in range(N - 1):
        lengths = (step - behind).clamp(min=0)
        cache.begin_step(lengths, step)
        at = torch.stack([qkv[row, length] for row, length in enumerate(lengths)])
        found[range(R), lengths] = cache.append_and_attend(0, at[:, None])[:, 0]
    mask = pattern_mask(pattern, P, G, CPU)
    keys, values = (
        torch.cat([part[0].expand(R, -1, -1, -1), qkv[:, :, 1 + n]], 1)
        for n, part in enumerate((prefix.keys, prefix.values))
    )
    queries = torch.cat([torch.zeros(R, P, H, D), qkv[:, :, 0] * D**0.5], 1)  # the cache takes divided ones
    expected = masked_attention(queries, keys, values, mask, backend="reference")[:, P:]
    for row, late in enumerate(behind.tolist()):
        torch.testing.assert_close(found[row, : N - 1 - late], expected[row, : N - 1 - late], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_not_read_changes_no_bit(pattern: AttentionPattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with every split read, and in windows."""
    prefix, qkv = _inputs()
    few, windows, whole = _cache(pattern, prefix), _cache(pattern, prefix, window=4), _cache(pattern, prefix)
    known = whole._pattern_places[pattern]
    all_splits = replace(known, is_split_read=torch.ones_like(known.is_split_read))
    monkeypatch.setitem(whole._pattern_places, pattern, all_splits)
    for position in range(0, N - 4, 4):
        lengths = torch.full((R,), position)
        windows.begin_step(lengths, position)
        together = windows.append_and_attend(0, qkv[:, position : position + 4])
        for offset in range(4):
            alone = []
            for cache in (few, whole):
                cache.begin_step(lengths + offset, position + offset)
                alone.append(cache.append_and_attend(0, qkv[:, position + offset, None])[:, 0])
            assert torch.equal(alone[0], alone[1])
            assert torch.equal(alone[0], together[:, offset])


@pytest.mark.parametrize(("pattern", "most"), [("axial_row", 1), ("axial_col", 1), ("dalle_col", 1), ("conv", 2)])
def test_few_splits_are_read(pattern: AttentionPattern, most: int) -> None:
    """Of a 16 x 16 grid's four, whatever is before; sequences in step."""
    cache = KVCache(2, 255, (1, P, H, D), patterns=(pattern,), grid_size=16, dtype=torch.float32, device=CPU)
    counts = []
    for position in range(255):
        cache.begin_step(torch.full((2,), position), position)
        assert cache._step is not None
        counts.append(len(cache._step.reads[pattern].splits))
    assert max(counts) <= most


def test_dalles_own_patterns_by_layer() -> None:
    """Columns in layers 2, 6, 10 … of 1 to L - 1, a convolution in layer L, rows elsewhere (arXiv 2102.12092, appendix B.1)."""
    assert dalle_patterns(8) == (
        "dalle_row", "dalle_col", "dalle_row", "dalle_row", "dalle_row", "dalle_col", "dalle_row", "dalle_conv"
    )  # fmt: skip
    config = TransformerConfig(num_layers=64, attention_patterns="dalle")
    assert [config.patterns.count(kind) for kind in ("dalle_col", "dalle_row", "dalle_conv")] == [16, 47, 1]
    assert TransformerConfig.model_validate_json(config.model_dump_json()).patterns == config.patterns


def test_dalles_rows_and_convolution_go_past_the_ends_of_rows() -> None:
    rows, conv = (pattern_mask(pattern, 0, 16, CPU) for pattern in ("dalle_row", "dalle_conv"))
    cell = 5 * 16 + 2
    assert rows[cell].nonzero()[:, 0].tolist() == list(range(cell - 16, cell + 1))  # up to the cell right above
    near = set(conv[cell].nonzero()[:, 0].tolist())
    assert {cell, cell - 5, cell - 16 + 5, cell - 16 - 5, cell - 5 * 16} <= near  # cell - 16 - 5 lies in the row before
    assert not near & {cell - 6, cell - 16 + 6, cell - 16 - 6, cell + 1}


def test_the_preset_generates_as_it_is_trained() -> None:
    model = random_model(CONFIG.model_copy(update={"attention_patterns": "dalle"})).eval()
    tokens = Sampler(model).generate(TEXT[:1], [SequenceRequest(0, SamplingParams(temperature=0))])
    with torch.no_grad():
        assert torch.equal(model.logits(TEXT[:1], tokens)[1].argmax(-1), tokens)
