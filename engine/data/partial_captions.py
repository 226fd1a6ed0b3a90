"""Pairs with sentences left out of their captions, for models that people prompt with less than a whole caption."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.data.caption_grammar import CaptionGrammar, leave_out
from engine.data.formats import grammar_of
from engine.data.label_format import Attributes
from engine.data.pairs import Pair, Pairs, Split


def with_partial_captions(pairs: Pairs, count: int, seed: int) -> Pairs:
    """The pairs with `count` more versions of each training caption, each with sentences left out.

    Held-out captions stay. The sentences left out are a function of (seed, place in the split).
    """
    if count == 0:
        return pairs
    grammar = _grammar(pairs)

    def change(pair: Pair, generator: np.random.Generator) -> Pair:
        partial = (leave_out(caption, generator, grammar) for caption in pair.captions for _ in range(count))
        return replace(pair, captions=(*pair.captions, *partial))

    return _changed(pairs, "train", change, seed)


def with_partial_held_out(pairs: Pairs, seed: int) -> Pairs:
    """The pairs with sentences left out of each held-out caption, and of attributes those that it still states."""
    grammar = _grammar(pairs)

    def change(pair: Pair, generator: np.random.Generator) -> Pair:
        caption = leave_out(pair.captions[0], generator, grammar)
        return replace(pair, captions=(caption,), attributes=_stated(pair.attributes, caption, grammar))

    return _changed(pairs, "validation", change, seed)


def _grammar(pairs: Pairs) -> CaptionGrammar | None:
    return grammar_of(pair.captions[0] for pair in pairs.all)


def _stated(attributes: Attributes, caption: str, grammar: CaptionGrammar | None) -> Attributes:
    """The attributes that a caption states; without a grammar, those of which it contains all values."""
    if grammar is not None:
        stated = {grammar.subject_attribute, *(fact.attribute for fact in grammar.facts(caption))}
        return {name: value for name, value in attributes.items() if name in stated}
    return {
        name: value
        for name, value in attributes.items()
        if all(text in caption for text in ([value] if isinstance(value, str) else value))
    }


def _changed(pairs: Pairs, split: Split, change: Callable[[Pair, np.random.Generator], Pair], seed: int) -> Pairs:
    """The pairs with those of one side changed, each by a generator of (seed, place in the split)."""
    place = itertools.count()
    return replace(
        pairs,
        all=tuple(
            change(pair, np.random.default_rng([seed, next(place)])) if pair.split == split else pair
            for pair in pairs.all
        ),
    )
