"""The labelled data sets that this engine reads: K-Fashion. The only way from engine/data to engine/data/kfashion.

With a second data set, the label format becomes an argument of `kodalle data`, and `grammar_of` tries one after another.
"""

from collections.abc import Iterable

from engine.data.caption_grammar import CaptionGrammar
from engine.data.kfashion.colours import COLOUR_ATTRIBUTE
from engine.data.kfashion.grammar import KFashionGrammar
from engine.data.kfashion.label_format import KFashionLabels
from engine.data.label_format import Attributes, LabelFormat


def default_label_format() -> LabelFormat:
    """How label files are read by default."""
    return KFashionLabels()


def grammar_of(captions: Iterable[str]) -> CaptionGrammar | None:
    """The grammar that some of the captions follow; None for captions without one."""
    grammar = KFashionGrammar()
    return grammar if any(grammar.facts(caption) for caption in captions) else None


def colour_attribute_of(attributes: Iterable[Attributes]) -> str | None:
    """The attribute whose values name the pairs' colours; None if they name none."""
    return COLOUR_ATTRIBUTE if any(isinstance(each.get(COLOUR_ATTRIBUTE), str) for each in attributes) else None
