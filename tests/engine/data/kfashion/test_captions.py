from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.caption_grammar import leave_out
from engine.data.kfashion.captions import (
    JOIN,
    caption,
    ordered,
    parse,
    particle,
    remove_style,
    remove_subject,
)
from engine.data.kfashion.grammar import KFashionGrammar
from engine.data.kfashion.labels import (
    ATTRIBUTES,
    GARMENT_TYPES,
    LIST_ATTRIBUTES,
    VOCABULARY,
    Garment,
    Label,
    vocabulary,
)
from engine.data.label_format import Attributes

ROMANTIC = "스타일에서 스타일은 로맨틱이다. 아우터에서 색상은 라벤더이다. 아우터에서 카테고리는 가디건이다."


def label(*garments: Garment, styles: tuple[Attributes, ...] = ()) -> Label:
    return Label("1", "1.jpg", 800, 800, styles, garments)


PUBLISHED = label(
    Garment("아우터", 0, {"색상": "라벤더", "카테고리": "가디건"}),
    styles=({"스타일": "로맨틱"},),
)
FULL = label(
    Garment(
        "상의",
        0,
        {
            "핏": "루즈",
            "프린트": ["무지"],
            "소재": ["우븐", "면"],
            "카테고리": "블라우스",
            "기장": "노말",
            "색상": "화이트",
            "소매기장": "긴팔",
            "서브색상": "블랙",
            "디테일": ["단추"],
            "넥라인": "브이넥",
            "옷깃": "셔츠칼라",
        },
    ),
    Garment("하의", 0, {"색상": "블랙"}),
    styles=({"스타일": "모던", "서브스타일": "페미닌"},),
)


def test_published_example() -> None:
    assert caption(PUBLISHED) == ROMANTIC


def test_order_and_particles_of_every_attribute() -> None:
    assert caption(FULL) == (
        "스타일에서 스타일은 모던이다. 스타일에서 서브스타일은 페미닌이다. 하의에서 색상은 블랙이다. "
        "상의에서 기장은 노말이다. 상의에서 색상은 화이트이다. 상의에서 서브색상은 블랙이다. "
        "상의에서 카테고리는 블라우스이다. 상의에서 옷깃은 셔츠칼라이다. 상의에서 디테일에는 단추이다. "
        "상의에서 소매기장은 긴팔이다. 상의에서 소재에는 우븐, 면이다. 상의에서 프린트에는 무지이다. "
        "상의에서 넥라인은 브이넥이다. 상의에서 핏은 루즈이다."
    )


def test_subject_once_is_the_published_variant() -> None:
    shirt = label(Garment("상의", 0, {"색상": "화이트", "기장": "노멀"}))
    assert caption(shirt, subject_once=True) == "상의에서 기장은 노멀이다. 색상은 화이트이다."


def test_style_is_dropped_as_the_ancestor_does() -> None:
    assert remove_style(ROMANTIC) == "아우터에서 색상은 라벤더이다. 아우터에서 카테고리는 가디건이다."
    assert caption(PUBLISHED, style=False) == remove_style(ROMANTIC)
    assert "서브스타일" not in caption(FULL, style=False)


def test_first_of_list_values() -> None:
    assert "소재에는 우븐이다." in caption(FULL, list_values="first")


def test_chosen_garments_in_caption_order() -> None:
    bottom, top = FULL.garments[1], FULL.garments[0]
    assert caption(FULL, [bottom], style=False) == "하의에서 색상은 블랙이다."
    assert caption(FULL, [top, bottom]) == caption(FULL, [bottom, top]) == caption(FULL)
    assert caption(FULL, [], style=False) == ""


def test_unknown_attributes_come_last_with_a_fitting_particle() -> None:
    odd = label(Garment("상의", 0, {"무게": "가벼움", "계절": "봄", "색상": "블랙", "태그": ["a", "b"], "size": "M"}))
    assert caption(odd) == (
        "상의에서 색상은 블랙이다. 상의에서 무게는 가벼움이다. 상의에서 계절은 봄이다. 상의에서 태그에는 a, b이다. "
        "상의에서 size은 M이다."
    )


def test_a_caption_is_one_line() -> None:
    assert caption(label(Garment("상의", 0, {"색상": "다크\n 블루"}))) == "상의에서 색상은 다크 블루이다."


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "스타일", "서브스타일"])
def test_particles_are_the_reference_table(attribute: str) -> None:
    expected = "에는" if attribute in LIST_ATTRIBUTES else "는" if attribute == "카테고리" else "은"
    assert particle(attribute) == expected


def test_cut_off_ends_give_no_fact() -> None:
    assert parse("상의에서 색상은 화이트이다. 상의에서 카테고리는 티셔") == [("상의", "색상", "화이트")]
    assert parse("상의에서 색상은 화이트이다. 상의에서 기장은") == [("상의", "색상", "화이트")]
    assert parse("a photo of a dress") == []
    assert parse("색상은 화이트이다.") == [("", "색상", "화이트")]


# ------------------------------------------------------------------------------------------------------ properties


def garments(garment_type: str) -> st.SearchStrategy[Garment]:
    known: dict[str, st.SearchStrategy[Any]] = {
        name: st.sampled_from(sorted(vocabulary(garment_type, name) or ())) for name in reversed(ATTRIBUTES)
    }
    for name in LIST_ATTRIBUTES:
        known[name] = st.lists(known[name], min_size=1, max_size=3)
    return st.builds(Garment, st.just(garment_type), st.just(0), st.fixed_dictionaries({}, optional=known))


styles = st.fixed_dictionaries({"스타일": st.sampled_from(sorted(VOCABULARY["스타일"]))})
labels = st.builds(
    lambda items, style: label(*reversed([item for item in items if item]), styles=(style,) if style else ()),
    st.tuples(*(st.none() | garments(each) for each in GARMENT_TYPES)),
    st.none() | styles,
)


def facts_of(item: Label) -> list[tuple[str, str, str]]:
    parts = [("스타일", style) for style in item.styles]
    parts += [
        (g.garment_type, ordered(g.attributes))
        for each in GARMENT_TYPES
        for g in item.garments
        if g.garment_type == each
    ]
    return [
        (part, name, value if isinstance(value, str) else JOIN.join(value))
        for part, attributes in parts
        for name, value in attributes.items()
    ]


@settings(max_examples=40, deadline=None)
@given(labels, st.booleans())
def test_parse_reads_back_what_caption_wrote(item: Label, subject_once: bool) -> None:
    assert parse(caption(item, subject_once=subject_once)) == facts_of(item)


@settings(max_examples=40, deadline=None)
@given(labels)
def test_dropping_in_the_label_equals_dropping_in_the_text(item: Label) -> None:
    text = caption(item)
    assert caption(item, style=False) == remove_style(text)
    assert caption(item, subject_once=True) == remove_subject(text)
    assert caption(item, style=False, subject_once=True) == remove_subject(remove_style(text))


@settings(max_examples=40, deadline=None)
@given(labels)
def test_variants_are_idempotent_and_single_spaced(item: Label) -> None:
    text = caption(item)
    assert "  " not in text
    assert text == text.strip()
    assert remove_style(remove_style(text)) == remove_style(text)
    assert remove_subject(remove_subject(text)) == remove_subject(text)
    assert text == "" or text.endswith("이다.")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.text())
def test_text_functions_take_any_text(text: str) -> None:
    assert "스타일" not in remove_style(text)
    remove_subject(text)
    parse(text)


def test_no_vocabulary_value_contains_the_join_or_a_full_stop() -> None:
    assert not [v for values in VOCABULARY.values() for v in values if JOIN in v or "." in v or "," in v]


@settings(max_examples=60, deadline=None)
@given(labels, st.booleans(), st.integers(0, 2**32))
def test_leaving_out_keeps_some_sentences_in_order_and_the_garment_of_each(item: Label, once: bool, seed: int) -> None:
    whole = caption(item, subject_once=once)
    partial = leave_out(whole, np.random.default_rng(seed), KFashionGrammar())
    stated, left = parse(whole), parse(partial)
    if len(stated) < 2:
        assert partial == whole
    else:
        assert 0 < len(left) < len(stated)
        rest = iter(stated)
        assert all(fact in rest for fact in left)  # a subsequence


def test_grammar_reads_back_what_it_writes() -> None:
    grammar = KFashionGrammar()
    facts = parse(caption(FULL))
    assert grammar.facts(grammar.write(facts)) == facts
    assert [fact.value for fact in facts if grammar.is_colour(fact.attribute)] == ["블랙", "화이트", "블랙"]
