"""Which images fit which captions: pairs that a contrastive loss must not take for negatives.

An image fits a caption of the same words as one of its own. With a caption grammar it also fits one that leaves out facts,
if its own captions state all that is left. A whole caption fits only images that state the same: what it does not name,
a second colour say, is not there.

M captions, B images.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from engine.data.caption_grammar import Fact
from engine.data.formats import grammar_of
from engine.data.pairs import Pair

_CACHED_CAPTIONS = 1 << 16


class CaptionFit:
    """The captions of a split and what they state.

    Args:
        pairs: the split, with the captions left out of which something is known as further captions of a pair.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._grammar = grammar_of(pair.captions[0] for pair in pairs)
        self._facts = lru_cache(maxsize=_CACHED_CAPTIONS)(self._read)

    def matrix(self, captions: Sequence[tuple[int, str]], images: Sequence[int]) -> np.ndarray:
        """(M, B) bool: whether image j fits caption i.

        Args:
            captions: M of them, each with the number of its pair.
            images: numbers of B pairs.
        """
        texts = [frozenset(self._pairs[number].captions) for number in images]
        stated = [self._stated(number) for number in images]
        fits = np.zeros((len(captions), len(images)), dtype=np.bool_)
        for row, (number, caption) in enumerate(captions):
            facts, whole = self._facts(caption), self._stated(number)
            if not facts:
                fits[row] = [caption in own for own in texts]
            elif facts == whole:
                fits[row] = [facts == other for other in stated]
            else:
                fits[row] = [facts <= other for other in stated]
        return fits

    def _stated(self, number: int) -> frozenset[Fact]:
        """All facts that the captions of a pair state."""
        return frozenset[Fact]().union(*(self._facts(caption) for caption in self._pairs[number].captions))

    def _read(self, caption: str) -> frozenset[Fact]:
        return frozenset() if self._grammar is None else frozenset(self._grammar.facts(caption))
