"""K-Fashion labels to KoDALLE's captions, and back.

The grammar is that of KoDALLE's published captions (its own converter is not public):
`{garment}에서 {attribute}{particle} {value}이다.`, sentences in the order 스타일, 아우터, 하의, 원피스, 상의 and, within a
garment, in the order of `labels.ATTRIBUTES` whatever the order of the file. 이다 is never inflected.

How KoDALLE joined several values of 디테일, 소재 or 프린트 is not known (every published caption has one). Here they are
joined by ", ", which no vocabulary value contains, so that `parse` can split them again; `list_values="first"` writes
captions of the form that the published models were trained on.

Source: KR-HappyFace/KoDALLE, README, slides, notebooks, preprocess.py.
"""

import re
from collections.abc import Iterable, Sequence

from engine.data.caption_grammar import Fact
from engine.data.kfashion.caption_options import ListValues
from engine.data.kfashion.labels import (
    ATTRIBUTES,
    GARMENT_TYPES,
    LIST_ATTRIBUTES,
    STYLE,
    STYLE_ATTRIBUTES,
    Garment,
    Label,
)
from engine.data.label_format import Attributes

JOIN = ", "

_ORDER = {name: rank for rank, name in enumerate((*STYLE_ATTRIBUTES, *ATTRIBUTES))}
_TYPE_ORDER = {name: rank for rank, name in enumerate(GARMENT_TYPES)}
_SENTENCE = re.compile(
    r"(?:(?P<garment>\S+)에서 )?(?P<attribute>\S+?)(?:에는|은|는) (?P<value>\S(?:.*?\S)??)이다\.(?=\s|$)"
)


def caption(
    label: Label,
    garments: Sequence[Garment] | None = None,
    *,
    style: bool = True,
    subject_once: bool = False,
    list_values: ListValues = "all",
) -> str:
    """The caption of a photo, or of some of its garments.

    Args:
        label: of the photo.
        garments: those of the label to describe; None for all.
        style: False drops every sentence that contains 스타일, as KoDALLE does when it loads its training data.
        subject_once: drops `상의에서` where it repeats (`상의에서 기장은 노멀이다. 색상은 화이트이다.`).
        list_values: all values of a list, joined by ", ", or the first alone.

    Returns:
        Sentences with single spaces between; "" when nothing is labelled.
    """
    described = label.garments if garments is None else garments
    chosen = sorted(described, key=lambda garment: (_TYPE_ORDER[garment.garment_type], garment.index))
    sentences = [line for entry in label.styles for line in _sentences(STYLE, entry, list_values)]
    for garment in chosen:
        sentences += _sentences(garment.garment_type, garment.attributes, list_values)
    if not style:
        sentences = [sentence for sentence in sentences if STYLE not in sentence]
    text = " ".join(sentences)
    return remove_subject(text) if subject_once else text


def remove_style(text: str) -> str:
    """Drops every sentence that contains 스타일 (so 서브스타일 too), as KoDALLE's `remove_style` does."""
    return ".".join(sentence for sentence in text.split(".") if STYLE not in sentence).strip()


def remove_subject(text: str) -> str:
    """Keeps the first of each `…에서` word and drops its repetitions, as KoDALLE's `remove_subj` does."""
    seen: set[str] = set()
    words = []
    for word in text.split(" "):
        if "에서" in word:
            if word in seen:
                continue
            seen.add(word)
        words.append(word)
    return " ".join(words)


def parse(text: str) -> list[Fact]:
    """The facts of a caption, in order; the subject is the garment type or 스타일.

    A sentence without a subject belongs to the garment before it ("" at the start), so captions that name the subject
    once give the same facts. List values are one text, joined by ", ". What is no whole sentence of the grammar, such as
    the cut-off ends of some published captions, gives no fact.
    """
    facts = []
    garment = ""
    for match in _SENTENCE.finditer(text):
        garment = match["garment"] or garment
        facts.append(Fact(garment, match["attribute"], match["value"]))
    return facts


def write_sentence(fact: Fact, *, several: bool = False) -> str:
    """One sentence of the grammar; `several`: its value is a list."""
    garment, attribute, value = fact
    return f"{garment}에서 {attribute}{particle(attribute, several=several)} {value}이다."


def ordered(attributes: Attributes) -> dict[str, str | list[str]]:
    """The attributes in the captions' order; unknown ones after, as in the file."""
    return dict(sorted(attributes.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))))


def particle(attribute: str, *, several: bool = False) -> str:
    """에는 for attributes that are lists; 은 after a final consonant, 는 after a vowel, as published."""
    if attribute in LIST_ATTRIBUTES or (several and attribute not in _ORDER):
        return "에는"
    last = ord(attribute[-1]) - ord("가") if attribute else 0
    is_hangul = 0 <= last < 11172
    return "는" if is_hangul and last % 28 == 0 else "은"  # 28 syllables share a vowel; the first has no final


def _sentences(garment: str, attributes: Attributes, list_values: ListValues) -> Iterable[str]:
    for attribute, value in ordered(attributes).items():
        several = not isinstance(value, str)
        texts = [value] if isinstance(value, str) else value[:1] if list_values == "first" else value
        joined = JOIN.join(" ".join(text.split()) for text in texts)  # a caption is one line
        yield write_sentence(Fact(garment, attribute, joined), several=several)
