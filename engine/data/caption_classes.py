"""Classes of captions: the commonest training captions without their colours, for classifying what an image shows.

With a caption grammar a class is the facts of a caption without its colours. Without one it is a set of attribute values
of the pairs, and its caption is the commonest training caption of the pairs that have them.
engine.metrics.independent_classifier assigns images to classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.caption_grammar import CaptionGrammar, Fact
from engine.data.formats import grammar_of, palette_of
from engine.data.pairs import Pair, Pairs

_MOST_CLASSES = 50  # more differ by attributes that no small image shows


@dataclass(frozen=True)
class CaptionClasses:
    """K classes: the facts that each one states, and a caption that states them."""

    facts: tuple[tuple[Fact, ...], ...]
    captions: tuple[str, ...]
    grammar: CaptionGrammar | None
    colour_attribute: str = ""

    def matching(self, pair: Pair) -> frozenset[int]:
        """The classes that a pair's caption may mean: those that state all its facts, colours aside.

        A caption with sentences left out matches several; one that matches none states something else than all classes.
        """
        facts = _facts(pair, self.grammar)
        subjects = {fact.subject for fact in facts}
        stated = set(_without_colours(facts, self.grammar, self.colour_attribute))
        return frozenset(
            number
            for number, own in enumerate(self.facts)
            if stated <= set(own) and subjects <= {fact.subject for fact in own}
        )


def find_caption_classes(pairs: Pairs) -> CaptionClasses | None:
    """The classes of the training captions; None if there are fewer than two."""
    grammar = grammar_of(pair.captions[0] for pair in pairs.train)
    palette = palette_of(pair.attributes for pair in pairs.train)
    colour = "" if palette is None else palette.attribute
    of_pairs = [_without_colours(_facts(pair, grammar), grammar, colour) for pair in pairs.train]
    counts = Counter(of_pairs)
    del counts[()]
    commonest = sorted(counts, key=lambda facts: (-counts[facts], facts))[:_MOST_CLASSES]
    if len(commonest) < 2:
        return None
    if grammar is not None:
        return CaptionClasses(tuple(commonest), tuple(grammar.write(facts) for facts in commonest), grammar)
    captions: dict[tuple[Fact, ...], Counter[str]] = {facts: Counter() for facts in commonest}
    for facts, pair in zip(of_pairs, pairs.train, strict=True):
        if facts in captions:
            captions[facts][pair.captions[0]] += 1
    by_class = tuple(_commonest_caption(captions[facts]) for facts in commonest)
    return CaptionClasses(tuple(commonest), by_class, None, colour)


def commonest_share(matching: Sequence[frozenset[int]]) -> float | None:
    """The share that the best constant answer gets right; None for no captions."""
    counts = Counter(number for classes in matching for number in classes)
    return max(counts.values(), default=0) / len(matching) if matching else None


def _facts(pair: Pair, grammar: CaptionGrammar | None) -> list[Fact]:
    if grammar is not None:
        return grammar.facts(pair.captions[0])
    return [
        Fact("", name, value if isinstance(value, str) else ", ".join(value))
        for name, value in sorted(pair.attributes.items())
    ]


def _without_colours(facts: Sequence[Fact], grammar: CaptionGrammar | None, colour: str) -> tuple[Fact, ...]:
    is_colour = (lambda attribute: attribute == colour) if grammar is None else grammar.is_colour
    return tuple(fact for fact in facts if not is_colour(fact.attribute))


def _commonest_caption(counts: Counter[str]) -> str:
    return min(counts, key=lambda caption: (-counts[caption], caption))
