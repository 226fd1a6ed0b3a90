"""The labelled data sets that this engine reads: K-Fashion. The only way from engine/data to engine/data/kfashion.

With a second data set, the label format becomes an argument of `kodalle data`, and `grammar_of` tries one after another.
"""

from collections.abc import Iterable

from engine.data.caption_grammar import CaptionGrammar, Palette
from engine.data.kfashion.colours import COLOUR_ATTRIBUTE, K_FASHION_COLOURS
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


def palette_of(attributes: Iterable[Attributes]) -> Palette | None:
    """The colours that the pairs' attributes name, only those that occur; None if they name none.

    Names that do not occur are left out: gold and silver, say, would take from yellow and grey what no label names.
    """
    values = (each.get(COLOUR_ATTRIBUTE) for each in attributes)
    occurring = {value for value in values if isinstance(value, str)}
    colours = {name: colour for name, colour in K_FASHION_COLOURS.items() if name in occurring}
    return Palette(COLOUR_ATTRIBUTE, colours) if colours else None
