"""The independent classifier assigns each image to the class whose caption it scores highest."""

from pathlib import Path

import torch

from engine.config import KoclipConfig
from engine.data.caption_classes import find_caption_classes
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


def test_images_have_the_class_of_the_highest_score() -> None:
    classes = find_caption_classes(PAIRS)
    assert classes is not None
    config = KoclipConfig(
        image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=16,
        text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=18, embed_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    koclip = KoClip(config).eval()
    tokenizer = train_tokenizer([pair.captions[0] for pair in PAIRS.all], vocab_size=60)
    images = torch.rand(7, 3, 32, 32)
    classifier = IndependentClassifier(koclip, tokenizer, classes)
    scores = koclip.similarity(images, tokenizer.encode(classes.captions, 16).tokens)  # (K, B)
    # embeddings of random weights lie close together: the classes are moved apart until images differ in class
    classifier._texts -= classifier._texts.mean(dim=0)
    found = classifier.classify(images.split(3))
    assert found == (scores - scores.mean(dim=0)).argmax(dim=0).tolist()
    assert classifier.classify([]) == []
