"""Captions that are wrong about an image in one fact: what a ranker learns to tell apart, and ranks candidates by.

The captions of a batch differ in most facts, so a ranker learns the commonest differences first and may never ask which of two
stated colours is the main one. Here a caption keeps all its facts but one, whose value is another's, or two colours of its
subject change places: only that fact is left to tell them apart by (NegCLIP, Yuksekgonul et al. 2023, arXiv:2210.01936, with
values instead of words).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.data.caption_grammar import CaptionGrammar, Fact
from engine.data.caption_guide import KnownAttributes
from engine.data.formats import grammar_of

_DRAWS = 8  # attempts at another value before a fact is given up: nearly all captions state the same one


class Question(NamedTuple):
    """Whether a caption fits an image better than wrong versions of it do."""

    right: str
    wrong: tuple[str, ...]  # one at least


class WrongCaptions:
    """Wrong versions of captions that follow a grammar.

    Args:
        values: of each (subject, attribute), those that other captions state, each as often as they do: by rare values
            alone, a ranker would learn to mistrust these.
    """

    def __init__(self, grammar: CaptionGrammar, values: Mapping[tuple[str, str], Sequence[str]]) -> None:
        self._grammar, self._values = grammar, values
        self._class_attribute = grammar.class_attribute
        self._subjects = tuple(dict.fromkeys(subject for subject, _ in values))

    def sample(self, caption: str, generator: np.random.Generator) -> str | None:
        """The caption with one fact changed, or with two colours of a subject exchanged; None where neither can be.

        Each fact, and the exchange, is as likely; a value as likely as it is common.
        """
        facts = self._grammar.facts(caption)
        choices: list[tuple[int, ...]] = [*((place,) for place in range(len(facts))), *self._exchanges(facts)]
        for choice in generator.permutation(len(choices)):
            places = choices[choice]
            if len(places) == 2:
                return self._exchanged(facts, *places)
            values = self._values.get(facts[places[0]][:2], ())
            for _ in range(_DRAWS if values else 0):
                value = values[int(generator.integers(len(values)))]
                if value not in _stated(facts, places[0]):
                    return self._changed(facts, places[0], value)
        return None

    def questions(self, caption: str, *, most: int) -> list[Question]:
        """What an image is asked about a caption; no more than `most` wrong captions in all, the first of each question first.

        Whether each fact's value fits better than its other values: a second colour's in the whole caption, all others' in
        one without second colours, which would speak for images in that colour alone. A subject's class is asked in its
        colour alone, and among the classes of all subjects: a shirt is taken for a jacket as easily as for a blouse. And of a
        subject's two colours, whether they fit better than exchanged, and better than the second alone, in the place of the first.
        """
        facts = self._grammar.facts(caption)
        pairs = list(self._exchanges(facts))
        seconds = {other for _, other in pairs}
        whole, of_colours = self._grammar.write(facts), list[Question]()
        for one, other in pairs:
            alone = self._changed(facts, one, facts[other].value, without={other})
            of_colours += [Question(whole, (self._exchanged(facts, one, other),)), Question(whole, (alone,))]
        of_colours = of_colours[:most]
        asked = [
            self._about_value(facts, place, set() if place in seconds else seconds)
            for place, fact in enumerate(facts)
            if fact.attribute != self._class_attribute
        ]
        asked += [self._about_class(facts, subject, seconds) for subject in _subjects(facts)]
        counts = _shares([len(question.wrong) for question in asked], most - len(of_colours))
        found = [Question(right, wrong[:count]) for (right, wrong), count in zip(asked, counts, strict=True) if count]
        return found + of_colours

    def _about_value(self, facts: Sequence[Fact], place: int, without: Collection[int]) -> Question:
        """Against the other values of a fact, which may be none; without the facts at some places."""
        stated = _stated(facts, place)
        values = dict.fromkeys(self._values.get(facts[place][:2], ()))
        wrong = (self._changed(facts, place, value, without=without) for value in values if value not in stated)
        return Question(self._changed(facts, place, facts[place].value, without=without), tuple(wrong))

    def _about_class(self, facts: Sequence[Fact], subject: str, without: Collection[int]) -> Question:
        """Against the other classes, in the same colour: of this subject, and of those that are not in the caption.

        Where no class is stated, against these other subjects with the same values. What a subject never states is left out of
        its version, and versions that state nothing are; there may be none.
        """
        name = self._class_attribute
        own = [fact for place, fact in enumerate(facts) if fact.subject == subject and place not in without]
        stated = {fact.value for fact in own if fact.attribute == name}
        if stated:
            own = [fact for fact in own if fact.attribute == name or self._grammar.is_colour(fact.attribute)]
        versions = list[list[Fact]]()
        for one in (subject, *(other for other in self._subjects if other not in _subjects(facts))):
            known = [
                fact._replace(subject=one)
                for fact in own
                if one == subject or fact.attribute == name or fact.value in self._values.get((one, fact.attribute), ())
            ]
            if stated:
                values = dict.fromkeys(self._values.get((one, name), ()))
                versions += [
                    [fact._replace(value=value) if fact.attribute == name else fact for fact in known]
                    for value in values
                    if one != subject or value not in stated
                ]
            elif one != subject:
                versions.append(known)
        return Question(
            self._grammar.write(own), tuple(self._grammar.write(version) for version in versions if version)
        )

    def _exchanges(self, facts: Sequence[Fact]) -> Iterator[tuple[int, int]]:
        colours = [place for place, fact in enumerate(facts) if self._grammar.is_colour(fact.attribute)]
        for number, one in enumerate(colours):
            for other in colours[number + 1 :]:
                if facts[one].subject == facts[other].subject and facts[one].value != facts[other].value:
                    yield one, other

    def _exchanged(self, facts: Sequence[Fact], one: int, other: int) -> str:
        values = {one: facts[other].value, other: facts[one].value}
        changed = [fact._replace(value=values.get(place, fact.value)) for place, fact in enumerate(facts)]
        return self._grammar.write(changed)

    def _changed(self, facts: Sequence[Fact], place: int, value: str, *, without: Collection[int] = ()) -> str:
        """With another value of the fact at a place, and without those at some."""
        changed = [fact._replace(value=value) if number == place else fact for number, fact in enumerate(facts)]
        return self._grammar.write([fact for number, fact in enumerate(changed) if number not in without])


def wrong_captions(captions: Sequence[str]) -> WrongCaptions | None:
    """Wrong versions of a split's captions; None where these follow no grammar, or no fact has a second value."""
    grammar = grammar_of(captions)
    if grammar is None:
        return None
    values: dict[tuple[str, str], list[str]] = {}
    for fact in _facts(grammar, captions):
        values.setdefault(fact[:2], []).append(fact.value)
    can_differ = any(len(set(one)) > 1 for one in values.values())
    return WrongCaptions(grammar, values) if can_differ else None


def wrong_captions_of_model(examples: Sequence[str], attributes: KnownAttributes) -> WrongCaptions | None:
    """Wrong versions of the captions that a model knows how to read; None where these follow no grammar.

    Args:
        examples, attributes: of its caption guide.
    """
    grammar = grammar_of(examples)
    if grammar is None:
        return None
    values = {(subject, name): own for subject, known in attributes.items() for name, own in known.items()}
    return WrongCaptions(grammar, values)


def _shares(numbers: Sequence[int], most: int) -> list[int]:
    """How many of each are taken when one of each is taken in turn, until `most`."""
    taken = [0] * len(numbers)
    for turn in range(max(numbers, default=0)):
        for place, number in enumerate(numbers):
            if turn < number and sum(taken) < most:
                taken[place] += 1
    return taken


def _facts(grammar: CaptionGrammar, captions: Iterable[str]) -> Iterator[Fact]:
    for caption in captions:
        yield from grammar.facts(caption)


def _subjects(facts: Sequence[Fact]) -> tuple[str, ...]:
    """The subjects of facts, in their order."""
    return tuple(dict.fromkeys(fact.subject for fact in facts))


def _stated(facts: Sequence[Fact], place: int) -> set[str]:
    """The values of a fact's attribute: it may be stated more than once (two materials), and none of these is wrong."""
    return {fact.value for fact in facts if fact[:2] == facts[place][:2]}
