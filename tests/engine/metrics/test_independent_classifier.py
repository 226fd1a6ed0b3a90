"""GarmentClasses of garments: what captions may mean, and a judge that must know them apart."""

from pathlib import Path

import pytest
import torch

from engine.config import KoclipConfig
from engine.data.kfashion.garment_classes import commonest_share, find_garment_classes
from engine.data.pairs import Pair, Pairs
from engine.data.tokenizer import train_tokenizer
from engine.metrics.independent_classifier import IndependentClassifier
from engine.models.koclip import KoClip

LONG = "하의에서 기장은 발목이다. 하의에서 색상은 {}이다. 하의에서 카테고리는 팬츠이다."
SHORT = "하의에서 기장은 미니이다. 하의에서 색상은 {}이다. 하의에서 서브색상은 블랙이다. 하의에서 카테고리는 팬츠이다."
SHIRT = "상의에서 색상은 {}이다. 상의에서 카테고리는 셔츠이다."


def pairs_of(*captions: str) -> Pairs:
    return Pairs(tuple(Pair(str(n), Path("x.png"), (text,), str(n), "train") for n, text in enumerate(captions)))


PAIRS = pairs_of(*(text.format(c) for text in (LONG, SHORT, SHIRT, SHIRT) for c in ("레드", "블루")))


def test_a_kind_is_a_caption_without_colours_the_commonest_first() -> None:
    kinds = find_garment_classes(PAIRS, "색상")
    assert kinds is not None
    assert kinds.captions == [
        "상의에서 카테고리는 셔츠이다.",
        "하의에서 기장은 미니이다. 하의에서 카테고리는 팬츠이다.",
        "하의에서 기장은 발목이다. 하의에서 카테고리는 팬츠이다.",
    ]


@pytest.mark.parametrize(
    ("caption", "fitting"),
    [
        (SHIRT.format("핑크"), {0}),
        (LONG.format("블루"), {2}),
        ("하의에서 카테고리는 팬츠이다.", {1, 2}),
        ("하의에서 색상은 레드이다.", {1, 2}),
        ("하의에서 기장은 미니이다.", {1}),
        ("상의에서 색상은 레드이다.", {0}),
        ("하의에서 카테고리는 스커트이다.", set()),
        ("아우터에서 색상은 레드이다.", set()),
        ("상의에서 카테고리는 셔츠이다. 하의에서 카테고리는 팬츠이다.", set()),
    ],
)
def test_what_a_caption_may_mean(caption: str, fitting: set[int]) -> None:
    kinds = find_garment_classes(PAIRS, "색상")
    assert kinds is not None
    assert kinds.fitting(caption) == fitting


def test_no_kinds_to_tell_apart() -> None:
    assert find_garment_classes(pairs_of("a red dress", "a blue shirt"), "색상") is None
    assert find_garment_classes(pairs_of(SHIRT.format("레드"), SHIRT.format("블루")), "색상") is None


def test_the_share_of_naming_all_alike() -> None:
    assert commonest_share([frozenset({0}), frozenset({1, 2}), frozenset({1}), frozenset({2, 0})]) == 0.5
    assert commonest_share([]) is None


def test_the_judge_names_the_kind_whose_caption_it_likes_best() -> None:
    kinds = find_garment_classes(PAIRS, "색상")
    assert kinds is not None
    config = KoclipConfig(
        image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=16,
        text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=18, embed_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    koclip = KoClip(config).eval()
    tokenizer = train_tokenizer([pair.captions[0] for pair in PAIRS.all], vocab_size=60)
    images = torch.rand(7, 3, 32, 32)
    judge = IndependentClassifier(koclip, tokenizer, kinds)
    scores = koclip.similarity(images, tokenizer.encode(kinds.captions, 16).tokens)  # (K, B)
    # embeddings of random weights lie close together: the kinds are moved apart until pictures are named differently
    judge._texts -= judge._texts.mean(dim=0)
    named = judge.name(images.split(3))
    assert named == (scores - scores.mean(dim=0)).argmax(dim=0).tolist()
    assert judge.name([]) == []
