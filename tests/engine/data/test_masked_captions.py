"""Masked captions: which tokens are chosen, what becomes of them."""

import numpy as np
import pytest

from engine.data.masked_captions import NO_TOKEN, mask_tokens, num_masked

CLS, PAD, SEP, UNK, MASK = range(5)
SPECIAL, WORDS = frozenset(range(5)), np.arange(5, 50)


def _masked(tokens: list[int], seed: int, share: float = 0.15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return mask_tokens(tokens, generator, share=share, mask=MASK, special=SPECIAL, words=WORDS)


def test_a_share_of_the_words_is_chosen_and_nothing_else_changes() -> None:
    tokens = [CLS, *range(5, 19), UNK, SEP, *[PAD] * 4]  # 14 words: three are chosen, of 21 places four at most
    kinds = {"masked": 0, "replaced": 0, "kept": 0}
    counts = np.zeros(len(tokens))
    for seed in range(2000):
        masked, positions, originals = _masked(tokens, seed)
        assert (positions.shape, originals.shape) == ((num_masked(0.15, 21),), (4,))
        chosen = positions[originals != NO_TOKEN]
        assert len(chosen) == len(set(chosen.tolist())) == 3
        assert [tokens[place] for place in chosen] == originals[:3].tolist()
        assert set(chosen.tolist()) <= set(range(1, 15))
        counts[chosen] += 1
        others = np.delete(np.arange(len(tokens)), chosen)
        assert np.array_equal(masked[others], np.array(tokens)[others])
        for place in chosen:
            new = masked[place]
            kinds["masked" if new == MASK else "kept" if new == tokens[place] else "replaced"] += 1
            assert new == MASK or new >= 5
    assert kinds["masked"] / 6000 == pytest.approx(0.8, abs=0.02)
    assert kinds["replaced"] / 6000 == pytest.approx(0.1, abs=0.02)  # but for one of 45 that is the token itself
    assert counts[1:15] / 2000 == pytest.approx(np.full(14, 3 / 14), abs=0.04)


def test_the_same_generator_masks_alike_and_a_caption_without_words_is_left_alone() -> None:
    tokens = [CLS, *range(5, 12), SEP, PAD]
    for one, other in zip(_masked(tokens, 3), _masked(tokens, 3), strict=True):
        assert np.array_equal(one, other)
    masked, _, originals = _masked([CLS, SEP, PAD, PAD], 0, share=0.5)
    assert masked.tolist() == [CLS, SEP, PAD, PAD]
    assert originals.tolist() == [NO_TOKEN, NO_TOKEN]
    _, _, originals = _masked([CLS, 7, SEP, PAD], 0)
    assert originals.tolist() == [7]  # one at least
