"""Captions with masked tokens, to be predicted (masked language modelling, as BERT's and RoBERTa's).

A share of the words' tokens is chosen, one at least: of these 80 % become [MASK], 10 % another token, and 10 % stay.

T text tokens, K tokens chosen at most.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np

_MASKED, _REPLACED = 0.8, 0.1
NO_TOKEN = -100
"""Fills up the originals: PyTorch's cross-entropy passes it over."""


def num_masked(share: float, text_seq_len: int) -> int:
    """K: tokens that are chosen of a caption at most."""
    return math.ceil(share * text_seq_len)


def mask_tokens(
    tokens: Sequence[int],
    generator: np.random.Generator,
    *,
    share: float,
    mask: int,
    special: Collection[int],
    words: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One masked caption.

    Args:
        tokens: T of a caption, padded.
        share: of its words' tokens that are chosen, rounded up.
        mask: the number of [MASK].
        special: tokens that are never chosen.
        words: the tokens that may stand in for another.

    Returns:
        the tokens (T,), where tokens were chosen (K,), and what stood there (K,); 0 and `NO_TOKEN` fill up. int64.
    """
    masked = np.array(tokens, dtype=np.int64)
    places = [place for place, token in enumerate(tokens) if token not in special]
    count = math.ceil(share * len(places))
    chosen = sorted(generator.choice(places, size=count, replace=False).tolist()) if places else []
    most = num_masked(share, len(tokens))
    positions, originals = np.zeros(most, dtype=np.int64), np.full(most, NO_TOKEN, dtype=np.int64)
    for number, place in enumerate(chosen):
        positions[number], originals[number] = place, tokens[place]
        draw = generator.random()
        if draw < _MASKED:
            masked[place] = mask
        elif draw < _MASKED + _REPLACED:
            masked[place] = generator.choice(words)
    return masked, positions, originals
