"""English captions: readable, and nothing of a caption lost."""

import itertools

from engine.data.caption_grammar import Fact
from engine.data.formats import grammar_of
from engine.data.kfashion import labels
from engine.data.kfashion.english import in_english
from engine.data.kfashion.grammar import KFashionGrammar


def test_a_caption_reads_as_one_would_write_it() -> None:
    grammar = grammar_of(["상의에서 색상은 그레이이다."])
    assert grammar is not None
    whole = (
        "하의에서 기장은 발목이다. 하의에서 색상은 네이비이다. 하의에서 카테고리는 팬츠이다. "
        "상의에서 색상은 그레이이다. 상의에서 서브색상은 화이트이다. 상의에서 카테고리는 티셔츠이다. "
        "상의에서 옷깃은 폴로칼라이다. 상의에서 디테일에는 단추, 포켓이다. 상의에서 소매기장은 반팔이다. 상의에서 프린트에는 무지이다."
    )
    assert grammar.in_english(whole) == (
        "Bottom: ankle length, navy, trousers; "
        "Top: grey, second colour white, T-shirt, polo collar, with buttons and pockets, short sleeves, no print"
    )
    assert grammar.in_english("상의에서 색상은 연두이다.") == "Top: 연두"  # outside the vocabulary
    assert grammar.in_english("a red lamp") == "a red lamp"


def test_english_tells_all_facts_of_the_vocabulary_apart_and_back() -> None:
    """The round trip: every fact's English is that of no other fact of its garment, and has no Korean in it."""
    grammar = KFashionGrammar()
    for garment in labels.GARMENT_TYPES:
        facts = [
            Fact(garment, attribute, value)
            for attribute in labels.ATTRIBUTES
            for value in sorted(labels.vocabulary(garment, attribute) or ())
        ]
        assert len(facts) > 100
        back = {in_english([fact]): fact for fact in facts}
        assert sorted(back.values()) == sorted(facts)
        assert all(text.isascii() for text in back)
        for fact in facts:
            assert back[grammar.in_english(grammar.write([fact]))] == fact
    styles = [Fact(labels.STYLE, attribute, value) for attribute, value in itertools.product(
        labels.STYLE_ATTRIBUTES, sorted(labels.VOCABULARY[labels.STYLE]))]  # fmt: skip
    assert len({in_english([fact]) for fact in styles}) == len(styles)
    assert all(in_english([fact]).isascii() for fact in styles)
