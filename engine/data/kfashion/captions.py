"""Labels to KoDALLE's captions, and back.

The grammar is the one seen in KoDALLE's published captions (its own converter is not public):
`{garment}에서 {attribute}{particle} {value}이다.`, sentences in the order 스타일, 아우터, 하의, 원피스, 상의 and, inside a
garment, in the order of `labels.ATTRIBUTES` whatever the order of the file. 이다 is never inflected.

How KoDALLE joined several values of 디테일, 소재 or 프린트 is not known (every caption seen has one). Here they are
joined by ", ", which no vocabulary value contains, so that `parse` can split them again; `list_values="first"` keeps
the captions inside what the published models have seen.

Source: KR-HappyFace/KoDALLE, README, slides, notebooks, preprocess.py.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from engine.data.kfashion.labels import (
    ATTRIBUTES,
    KINDS,
    LIST_ATTRIBUTES,
    STYLE,
    STYLE_ATTRIBUTES,
    Attributes,
    Garment,
    Label,
)

ListValues = Literal["all", "first"]
JOIN = ", "

_ORDER = {name: rank for rank, name in enumerate((*STYLE_ATTRIBUTES, *ATTRIBUTES))}
_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")
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
        label: what is told.
        garments: those of the label to tell; None for all.
        style: False drops every sentence that contains 스타일, as KoDALLE does when it loads its training data.
        subject_once: drops `상의에서` where it repeats (`상의에서 기장은 노멀이다. 색상은 화이트이다.`).
        list_values: all values of a list, joined by ", ", or the first alone.

    Returns:
        Sentences with single spaces between; "" when nothing is labelled.
    """
    chosen = sorted(label.garments if garments is None else garments, key=lambda g: (KINDS.index(g.kind), g.index))
    sentences = [line for entry in label.styles for line in _sentences(STYLE, entry, list_values)]
    for garment in chosen:
        sentences += _sentences(garment.kind, garment.attributes, list_values)
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


def leave_out(text: str, generator: np.random.Generator) -> str:
    """Some of the sentences of a caption of any kind, in their order: as often one as all but one.

    Who asks for a picture tells what matters to him, and a model that has only read whole captions takes what is not
    told for something unknown. A caption of one sentence stays. Where the sentence that names the garment is left out
    (captions with the subject told once), the next one of that garment names it.
    """
    sentences = _SENTENCE_END.split(text.strip())
    if len(sentences) < 2:
        return text
    kept = generator.choice(len(sentences), size=generator.integers(1, len(sentences)), replace=False)
    told = []
    subject, subject_told = "", ""
    for index, sentence in enumerate(sentences):
        first = sentence.partition(" ")[0]
        has_subject = first.endswith("에서")
        subject = first if has_subject else subject
        if index in kept:
            told.append(sentence if has_subject or subject == subject_told else f"{subject} {sentence}")
            subject_told = subject
    return " ".join(told)


def parse(text: str) -> list[tuple[str, str, str]]:
    """The (garment, attribute, value) triples of a caption, in order.

    A sentence without a subject belongs to the garment before it ("" at the start), so captions with the subject told
    once read alike. List values come as one text, joined by ", ". Anything that is no whole sentence of the grammar,
    as the cut-off ends of some published captions, gives no triple.
    """
    triples = []
    garment = ""
    for match in _SENTENCE.finditer(text):
        garment = match["garment"] or garment
        triples.append((garment, match["attribute"], match["value"]))
    return triples


def ordered(attributes: Attributes) -> Attributes:
    """The attributes in the captions' order; unknown ones after, as in the file."""
    return dict(sorted(attributes.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))))


def particle(attribute: str, *, several: bool = False) -> str:
    """에는 for attributes that are lists; 은 after a final consonant, 는 after a vowel, which is what is published."""
    if attribute in LIST_ATTRIBUTES or (several and attribute not in _ORDER):
        return "에는"
    last = ord(attribute[-1]) - ord("가") if attribute else 0
    is_hangul = 0 <= last < 11172
    return "는" if is_hangul and last % 28 == 0 else "은"  # 28 syllables share a vowel; the first has no final


def _sentences(garment: str, attributes: Attributes, list_values: ListValues) -> Iterable[str]:
    for attribute, value in ordered(attributes).items():
        several = not isinstance(value, str)
        texts = [value] if isinstance(value, str) else value[:1] if list_values == "first" else value
        told = JOIN.join(" ".join(text.split()) for text in texts)  # a caption is one line
        yield f"{garment}에서 {attribute}{particle(attribute, several=several)} {told}이다."
