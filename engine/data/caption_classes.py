"""Classes of captions: what sort of thing an image shows, for classifying generations.

With a caption grammar a class is the value of its class attribute (K-Fashion: 카테고리, ten of them here). Without one it
is a set of attribute values of the pairs, colours aside: colours are read from pixels (engine.metrics.colour).
engine.metrics.independent_classifier assigns images to classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.caption_grammar import CaptionGrammar, Fact
from engine.data.formats import colour_attribute_of, grammar_of
from engine.data.pairs import Pair, Pairs

_MOST_CLASSES = 50  # more differ by attributes that no small image shows

Facts = tuple[Fact, ...]


@dataclass(frozen=True)
class CaptionClasses:
    """K classes, the commonest first.

    Args:
        facts: that make each class.
        captions: for each class, the sets of facts, colours aside, that its training captions state.
        colour_attribute: of captions without a grammar.
    """

    facts: tuple[Facts, ...]
    captions: tuple[frozenset[frozenset[Fact]], ...]
    grammar: CaptionGrammar | None
    colour_attribute: str = ""

    def of(self, pair: Pair) -> int | None:
        """The class that a pair's caption states in full; None if it states none."""
        own = _class_facts(self._stated(pair), self.grammar)
        return self.facts.index(own) if own in self.facts else None

    def matching(self, pair: Pair) -> frozenset[int]:
        """The classes that a pair's caption may mean.

        A caption with sentences left out may not state its class: then it may mean all those of which some training
        caption states everything that it does. One that matches none states something else than all classes.
        """
        stated = self._stated(pair)
        own = _class_facts(stated, self.grammar)
        if own in self.facts:
            return frozenset([self.facts.index(own)])
        subjects = {fact.subject for fact in _facts(pair, self.grammar)}  # a colour has one, too
        return frozenset(
            number
            for number, captions in enumerate(self.captions)
            if any(
                set(stated) <= caption and subjects <= {fact.subject for fact in self.facts[number]}
                for caption in captions
            )
        )

    def _stated(self, pair: Pair) -> Facts:
        return _without_colours(_facts(pair, self.grammar), self.grammar, self.colour_attribute)


def find_caption_classes(pairs: Pairs) -> CaptionClasses | None:
    """The classes of the training captions; None if there are fewer than two."""
    grammar = grammar_of(pair.captions[0] for pair in pairs.train)
    colour = colour_attribute_of(pair.attributes for pair in pairs.train) or ""
    counts: Counter[Facts] = Counter()
    captions: dict[Facts, set[frozenset[Fact]]] = {}
    for pair in pairs.train:
        stated = _without_colours(_facts(pair, grammar), grammar, colour)
        if own := _class_facts(stated, grammar):
            counts[own] += 1
            captions.setdefault(own, set()).add(frozenset(stated))
    commonest = sorted(counts, key=lambda facts: (-counts[facts], facts))[:_MOST_CLASSES]
    if len(commonest) < 2:
        return None
    stated_by = tuple(frozenset(captions[facts]) for facts in commonest)
    return CaptionClasses(tuple(commonest), stated_by, grammar, colour)


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


def _without_colours(facts: Sequence[Fact], grammar: CaptionGrammar | None, colour: str) -> Facts:
    is_colour = (lambda attribute: attribute == colour) if grammar is None else grammar.is_colour
    return tuple(fact for fact in facts if not is_colour(fact.attribute))


def _class_facts(facts: Facts, grammar: CaptionGrammar | None) -> Facts:
    """Those of a caption's facts that make its class."""
    return facts if grammar is None else tuple(fact for fact in facts if fact.attribute == grammar.class_attribute)
