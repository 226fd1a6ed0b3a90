"""Classes of captions: with a caption grammar, and by attributes without one."""

from pathlib import Path

import pytest

from engine.data.caption_classes import commonest_share, find_caption_classes
from engine.data.pairs import Pair, Pairs

LONG = "하의에서 기장은 발목이다. 하의에서 색상은 {}이다. 하의에서 카테고리는 팬츠이다."
SHORT = "하의에서 기장은 미니이다. 하의에서 색상은 {}이다. 하의에서 서브색상은 블랙이다. 하의에서 카테고리는 팬츠이다."
SHIRT = "상의에서 색상은 {}이다. 상의에서 카테고리는 셔츠이다."


def pairs_of(*captions: str) -> Pairs:
    return Pairs(tuple(Pair(str(n), Path("x.png"), (text,), str(n), "train") for n, text in enumerate(captions)))


PAIRS = pairs_of(*(text.format(c) for text in (LONG, SHORT, SHIRT, SHIRT) for c in ("레드", "블루")))


def test_a_class_is_the_value_of_the_grammars_class_attribute_the_commonest_first() -> None:
    classes = find_caption_classes(PAIRS)
    assert classes is not None
    assert [[fact.value for fact in facts] for facts in classes.facts] == [["셔츠"], ["팬츠"]]
    assert [classes.of(pair) for pair in PAIRS.all] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert classes.of(pairs_of("하의에서 색상은 레드이다.").all[0]) is None


@pytest.mark.parametrize(
    ("caption", "matching"),
    [
        (SHIRT.format("핑크"), {0}),
        (LONG.format("블루"), {1}),
        ("하의에서 카테고리는 팬츠이다. 하의에서 기장은 맥시이다.", {1}),  # together in no training caption
        ("하의에서 색상은 레드이다.", {1}),
        ("하의에서 기장은 미니이다.", {1}),
        ("하의에서 기장은 맥시이다.", set()),
        ("상의에서 색상은 레드이다.", {0}),
        ("하의에서 카테고리는 스커트이다.", set()),
        ("아우터에서 색상은 레드이다.", set()),
        ("상의에서 카테고리는 셔츠이다. 하의에서 카테고리는 팬츠이다.", set()),
    ],
)
def test_what_a_caption_may_mean(caption: str, matching: set[int]) -> None:
    classes = find_caption_classes(PAIRS)
    assert classes is not None
    assert classes.matching(pairs_of(caption).all[0]) == matching


def test_what_is_left_out_may_be_several_classes() -> None:
    """Of the classes that a training caption has with all that is stated."""
    skirt = "하의에서 기장은 미니이다. 하의에서 카테고리는 스커트이다."
    classes = find_caption_classes(pairs_of(LONG.format("레드"), LONG.format("블루"), SHORT.format("블루"), skirt))
    assert classes is not None
    assert classes.matching(pairs_of("하의에서 색상은 레드이다.").all[0]) == {0, 1}
    assert classes.matching(pairs_of("하의에서 기장은 미니이다.").all[0]) == {0, 1}
    assert classes.matching(pairs_of("하의에서 기장은 발목이다.").all[0]) == {0}


def test_fewer_than_two_classes_are_none() -> None:
    assert find_caption_classes(pairs_of("a red dress", "a blue shirt")) is None
    assert find_caption_classes(pairs_of(SHIRT.format("레드"), SHIRT.format("블루"))) is None


def test_share_of_the_best_constant_answer() -> None:
    assert commonest_share([frozenset({0}), frozenset({1, 2}), frozenset({1}), frozenset({2, 0})]) == 0.5
    assert commonest_share([]) is None


def test_without_a_grammar_classes_are_attribute_values_but_colours() -> None:
    def pair(key: str, caption: str, **attributes: str | list[str]) -> Pair:
        return Pair(key, Path("x.png"), (caption,), key, "train", attributes)

    pairs = Pairs((
        pair("a", "a red lamp", 색상="레드", sort="lamp"),
        pair("b", "a lamp", 색상="블루", sort="lamp"),
        pair("c", "a lamp", sort="lamp"),
        pair("d", "an oak chair", sort="chair", material=["oak", "felt"]),
    ))  # fmt: skip
    classes = find_caption_classes(pairs)
    assert classes is not None
    assert [sorted(fact.value for fact in facts) for facts in classes.facts] == [["lamp"], ["chair", "oak, felt"]]
    assert [sorted(classes.matching(one)) for one in pairs.all] == [[0], [0], [0], [1]]
    assert classes.matching(pair("e", "a chair", sort="chair")) == {1}  # sentences left out
    assert classes.matching(pair("f", "red", 색상="레드")) == {0, 1}
    assert classes.matching(pair("g", "a table", sort="table")) == frozenset()
