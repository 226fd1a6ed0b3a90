"""The form writes what the caption module writes, and knows every word of the labels."""

import pytest

from engine.data.caption_guide import CaptionForm
from engine.data.kfashion import captions, labels
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.kfashion.labels import Garment, Label


def _written(form: CaptionForm, garment: str, attributes: dict[str, str | list[str]]) -> str:
    sentences = []
    for attribute in form.attributes:
        value = attributes.get(attribute.name)
        if value:
            text = form.separator.join(value) if isinstance(value, list) else value
            sentences.append(attribute.sentence.replace("{subject}", garment).replace("{value}", text))
    return " ".join(sentences)


@pytest.mark.parametrize("garment", labels.GARMENT_TYPES)
def test_the_form_writes_the_captions_of_labels(garment: str) -> None:
    form = kfashion_form()
    attributes: dict[str, str | list[str]] = {
        name: ["첫째", "둘째"] if name in labels.LIST_ATTRIBUTES else "블랙" for name in reversed(labels.ATTRIBUTES)
    }
    wanted = captions.caption(Label("photo", "", None, None, (), (Garment(garment, 0, attributes),)))
    assert _written(form, garment, attributes) == wanted


def test_the_form_knows_every_word_of_the_labels() -> None:
    form = kfashion_form()
    assert form.subjects == tuple(labels.GARMENT_TYPES)
    assert sorted(form.shown_subjects) == sorted(labels.GARMENT_TYPES)
    assert sorted(form.shown_attributes) == sorted(labels.ATTRIBUTES)
    known = set(labels.GARMENT_TYPES) | set(labels.ATTRIBUTES)
    for garment in labels.GARMENT_TYPES:
        for name in labels.ATTRIBUTES:
            known |= labels.vocabulary(garment, name) or frozenset()
    assert set(form.words["en"]) == known
    assert all(word.isascii() for word in form.words["en"].values())
    several = {each.name for each in form.attributes if each.control == "several"}
    assert several == set(labels.LIST_ATTRIBUTES)
