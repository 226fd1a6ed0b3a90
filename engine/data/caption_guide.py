"""How to write captions for a model: examples from its training, the words and attributes it knows, the form of its sentences.

A model folder holds the guide as `captions.json` and the server passes it to its page, so neither needs to know what the
images show. It may be edited: the synonyms above all, which say what people write for the model's words. Imports no torch.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.section import Section, parse_section
from engine.files import read_json, write_json

GUIDE_FILE = "captions.json"
NUM_EXAMPLES = 8
_MOST_COMPARED = 10_000  # captions; millions would take minutes
_MOST_WORDS = 20_000  # a rarer one has hardly been learned, and the file is read at every start
_WORD = re.compile(r"\w+")
KnownAttributes = dict[str, dict[str, list[str]]]
Colour = Annotated[str, Field(pattern="^#[0-9a-f]{6}$")]


class FormAttribute(Section):
    """One attribute of a subject, and the sentence that states it."""

    name: str
    sentence: str = Field(description="of a caption, with {subject} and {value} in it")
    control: Literal["chips", "swatches", "select", "several"] = Field(
        "select", description="several: any number of values, joined by the separator; the others: one value"
    )

    @model_validator(mode="after")
    def _has_a_value(self) -> "FormAttribute":
        if self.sentence.count("{value}") != 1:
            raise ValueError(f"sentence {self.sentence!r} must contain {{value}} once")
        return self


class CaptionForm(Section):
    """The sentences of captions that are made from labels: one for each attribute of each subject, in this order."""

    title: dict[str, str] = Field(description="of the form, by language")
    subjects: tuple[str, ...] = Field(description="in the order of a caption's sentences")
    attributes: tuple[FormAttribute, ...] = Field(description="in the order of a subject's sentences")
    separator: str = ", "
    shown_subjects: tuple[str, ...] = Field((), description="in the order of a form's choices; empty: as in captions")
    shown_attributes: tuple[str, ...] = Field((), description="in the order of a form's fields; empty: as in captions")
    words: dict[str, dict[str, str]] = Field(
        {}, description="by language: what subjects, attributes and values are called, in the order to show values in"
    )
    colours: dict[str, Colour] = Field({}, description="values that are colours, as #rrggbb")


class CaptionGuide(Section):
    """What a person, or a page, must know to write captions like those that a model was trained on."""

    examples: tuple[str, ...] = Field((), description="captions of the training split")
    attributes: KnownAttributes = Field({}, description="subject to attribute to values, the commonest first")
    form: CaptionForm | None = Field(None, description="how attributes become sentences; null: captions are free text")
    synonyms: dict[str, str] = Field(
        {}, description="what people write, also in other languages, to the model's word or value for it"
    )
    words: tuple[str, ...] = Field(
        (), description="of the training captions, the commonest first, 20,000 at most; empty: not known"
    )


def example_captions(captions: Iterable[str], count: int = NUM_EXAMPLES) -> tuple[str, ...]:
    """The commonest caption, then the ones with the greatest share of words that no earlier example has.

    Chosen from the 10,000 commonest captions. Ties go to the commoner one, then to the first in code point order, so that
    the choice depends on the captions alone, not on their order.
    """
    counts = Counter(" ".join(caption.split()) for caption in captions)
    counts.pop("", None)
    common = heapq.nsmallest(_MOST_COMPARED, counts, key=lambda caption: (-counts[caption], caption))
    words = {caption: frozenset(caption.split()) for caption in common}
    chosen: list[str] = []
    used: frozenset[str] = frozenset()
    while words and len(chosen) < count:
        # max returns the first of equals, and the commonest comes first
        best = max(words, key=lambda caption: len(words[caption] - used) / len(words[caption]) if used else 0)
        chosen.append(best)
        used |= words.pop(best)
    return tuple(chosen)


def training_words(captions: Iterable[str]) -> tuple[str, ...]:
    """The words of captions without their punctuation: the 20,000 commonest, equals in code point order."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(_WORD.findall(caption))
    return tuple(heapq.nsmallest(_MOST_WORDS, counts, key=lambda word: (-counts[word], word)))


def read_guide(folder: Path) -> CaptionGuide:
    """The caption guide of a model folder; an empty one where it has none.

    Raises:
        InputError: its file is not of that form.
    """
    path = folder / GUIDE_FILE
    if not path.is_file():
        return CaptionGuide()
    tree = read_json(path, field="model folder", remedy="correct it, or remove it")
    guide: CaptionGuide = parse_section(CaptionGuide, tree, source=str(path))
    return guide


def write_guide(folder: Path, guide: CaptionGuide) -> None:
    """Writes nothing for an empty guide."""
    if guide != CaptionGuide():
        write_json(folder / GUIDE_FILE, guide.model_dump(mode="json"))
