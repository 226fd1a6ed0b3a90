"""Example captions are typical and various; a guide knows the form of captions that follow a grammar."""

import random
from pathlib import Path

import pytest

from engine.data.caption_guide import CaptionGuide, example_captions, read_guide
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.pairs import Pair, caption_guide
from engine.errors import InputError


def test_examples_begin_with_the_commonest_and_then_differ() -> None:
    common = ["a red square"] * 5 + ["a red ring"] * 3 + ["a blue dot"] * 2 + ["one green line"]
    wanted = ("a red square", "one green line", "a blue dot", "a red ring")
    assert example_captions(common) == wanted
    shuffled = common.copy()
    random.Random(1).shuffle(shuffled)
    assert example_captions(shuffled) == wanted  # their order says nothing
    assert example_captions(common, 2) == wanted[:2]
    assert example_captions(["", " a  b ", "a b", "c"]) == ("a b", "c")
    assert example_captions([]) == ()


def test_faults_of_a_guide_are_named(tmp_path: Path) -> None:
    sentence = '{"name": "colour", "sentence": "It is red."}'
    for form, fault in (
        (f'{{"title": {{}}, "subjects": [], "attributes": [{sentence}]}}', "form.attributes"),
        ('{"title": {}, "subjects": [], "attributes": [], "colours": {"red": "url(x)"}}', "form.colours"),
    ):
        (tmp_path / "captions.json").write_text(f'{{"form": {form}}}')
        with pytest.raises(InputError, match=r"captions\.json") as raised:
            read_guide(tmp_path)
        assert raised.value.field.startswith(fault)


def test_captions_that_follow_a_grammar_have_its_form() -> None:
    def pair(caption: str, **attributes: str) -> Pair:
        return Pair(caption, Path("image.png"), (caption,), caption, "train", attributes)

    composed = [pair("상의에서 색상은 레드이다.", garment="상의", 색상="레드")]
    guide = caption_guide(composed)
    assert guide.synonyms
    assert guide == CaptionGuide(
        examples=("상의에서 색상은 레드이다.",),
        attributes={"상의": {"색상": ["레드"]}},
        form=kfashion_form(),
        words=("레드이다", "상의에서", "색상은"),
        synonyms=guide.synonyms,
    )
    assert caption_guide([pair("빨강 네모")]) == CaptionGuide(examples=("빨강 네모",), words=("네모", "빨강"))
