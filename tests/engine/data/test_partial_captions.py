"""Pairs with sentences left out of their captions: which side changes, and which attributes stay."""

from pathlib import Path

from engine.data.label_format import Attributes
from engine.data.pairs import Pair, Pairs
from engine.data.partial_captions import with_partial_captions, with_partial_held_out


def two_sided() -> Pairs:
    caption = "하의에서 기장은 발목이다. 하의에서 색상은 블루이다. 하의에서 카테고리는 팬츠이다."
    attributes = {"garment": "하의", "기장": "발목", "색상": "블루", "카테고리": "팬츠"}
    sides = ["train", "validation", "train", "train", "validation"]
    return Pairs(tuple(
        Pair(str(n), Path(f"{n}.png"), (caption,), str(n), side, attributes) for n, side in enumerate(sides)  # type: ignore[arg-type]
    ))  # fmt: skip


def test_training_pairs_have_partial_captions_beside_the_whole_ones() -> None:
    pairs = two_sided()
    more = with_partial_captions(pairs, 3, seed=1)
    whole = pairs.all[0].captions[0]
    assert with_partial_captions(pairs, 0, seed=1) is pairs
    assert more == with_partial_captions(pairs, 3, seed=1)
    assert more != with_partial_captions(pairs, 3, seed=2)
    assert more.validation == pairs.validation
    for pair in more.train:
        assert pair.captions[0] == whole
        assert len(pair.captions) == 4
        assert all(caption and len(caption) < len(whole) for caption in pair.captions[1:])
    assert len({caption for pair in more.train for caption in pair.captions}) > 3  # not one choice for all


def test_held_out_pairs_keep_the_attributes_that_are_still_stated() -> None:
    pairs = two_sided()
    fewer = with_partial_held_out(pairs, seed=1)
    assert fewer.train == pairs.train
    for pair in fewer.validation:
        assert set(pair.attributes) < {"garment", "기장", "색상", "카테고리"}
        for name in ("기장", "색상", "카테고리"):
            assert (name in pair.attributes) == (name in pair.captions[0])
        assert pair.attributes["garment"] == "하의"


def test_without_a_grammar_the_attributes_whose_values_the_caption_contains() -> None:
    caption = "A red coat. It is long. It is made of wool."
    attributes: Attributes = {"colour": "red", "material": ["wool"]}
    pairs = Pairs(tuple(Pair(str(n), Path("x"), (caption,), str(n), "validation", attributes) for n in range(8)))
    fewer = with_partial_held_out(pairs, seed=0)
    for pair in fewer.all:
        assert ("colour" in pair.attributes) == ("red" in pair.captions[0])
        assert ("material" in pair.attributes) == ("wool" in pair.captions[0])
    assert len({pair.captions for pair in fewer.all}) > 2
