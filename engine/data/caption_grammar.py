"""What can be read from captions that follow a grammar: facts and their subjects; and captions with sentences left out.

A data set whose captions are made from labels implements `CaptionGrammar`; engine.data.formats finds the grammar of a
set's captions. Captions that people wrote have none.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from engine.data.caption_guide import CaptionForm

_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")


class Fact(NamedTuple):
    """The fact that one sentence states: `subject` has the `value` under `attribute`."""

    subject: str
    attribute: str
    value: str


class CaptionGrammar(Protocol):
    """The grammar of captions that were made from labels."""

    @property
    def subject_attribute(self) -> str:
        """The attribute of a pair that names the subject of all its other attributes."""
        ...

    @property
    def class_attribute(self) -> str:
        """The attribute whose value says what sort of thing its subject is, e.g. shirt or trousers."""
        ...

    def facts(self, caption: str) -> list[Fact]:
        """The facts of a caption, in order; [] for text that does not follow the grammar."""
        ...

    def write(self, facts: Sequence[Fact]) -> str:
        """The caption that states these facts."""
        ...

    def in_english(self, caption: str) -> str:
        """The caption's facts in English; the caption itself where it states none."""
        ...

    def subject_phrase(self, sentence: str) -> str:
        """The words at the beginning of a sentence that name its subject; "" if it names none."""
        ...

    def is_colour(self, attribute: str) -> bool:
        """Whether the values of an attribute are colours."""
        ...

    def form(self) -> CaptionForm:
        """The grammar as data, for a page on which captions are composed."""
        ...

    def synonyms(self) -> dict[str, str]:
        """What people write for its values, in any language, to the value."""
        ...


def leave_out(text: str, generator: np.random.Generator, grammar: CaptionGrammar | None) -> str:
    """Some of the sentences of a caption, in their order: each number from one to all but one is as likely.

    People who want an image state what matters to them, and a model that has only read whole captions takes what is not
    stated for something unknown. A caption of one sentence stays. If the sentence that names the subject is left out, the
    next sentence about that subject names it, by `grammar`.
    """
    sentences = _SENTENCE_END.split(text.strip())
    if len(sentences) < 2:
        return text
    kept = generator.choice(len(sentences), size=generator.integers(1, len(sentences)), replace=False)
    result = []
    subject, stated_subject = "", ""
    for index, sentence in enumerate(sentences):
        phrase = grammar.subject_phrase(sentence) if grammar is not None else ""
        subject = phrase or subject
        if index in kept:
            result.append(sentence if phrase or subject == stated_subject else f"{subject} {sentence}")
            stated_subject = subject
    return " ".join(result)
