"""Shares of right images, by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.caption_classes import find_caption_classes
from engine.data.pairs import Pair, Pairs, Split
from engine.metrics.agreement import ImageReader, Right, colour_names
from engine.metrics.independent_classifier import IndependentClassifier
from engine.metrics.lite0_features import NUM_FEATURES


def square(colour: tuple[int, int, int]) -> np.ndarray:
    pixels = np.full((32, 32, 3), 235, np.uint8)
    pixels[6:26, 6:26] = colour
    return pixels


RED, BLUE = square((185, 40, 50)), square((70, 105, 160))


def pair(folder: Path, number: int, colour: str, garment: str, category: str, split: Split = "train") -> Pair:
    caption = f"{garment}에서 색상은 {colour}이다. {garment}에서 카테고리는 {category}이다."
    return Pair(str(number), folder / f"{colour}.png", (caption,), str(number), split, {"색상": colour})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("images")
    for name, image in (("레드", RED), ("블루", BLUE)):
        Image.fromarray(image).save(folder / f"{name}.png")
    return Pairs((
        pair(folder, 0, "레드", "상의", "셔츠"), pair(folder, 1, "블루", "하의", "팬츠"), pair(folder, 2, "레드", "상의", "셔츠"),
        pair(folder, 3, "레드", "상의", "셔츠", "validation"), pair(folder, 4, "블루", "하의", "팬츠", "validation"),
        pair(folder, 5, "블루", "하의", "스커트", "validation"),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def reader(pairs: Pairs) -> ImageReader:
    """Class 0 (shirts) where the first feature is positive."""
    classes = find_caption_classes(pairs)
    assert classes is not None
    weight = torch.zeros(NUM_FEATURES, 2)
    weight[0] = torch.tensor([1.0, -1.0])
    scale = torch.ones(NUM_FEATURES)
    classifier = IndependentClassifier(classes.facts, torch.zeros(NUM_FEATURES), scale, weight, torch.zeros(2))
    return ImageReader(colour_names(pairs, 32), classifier, classes)


def features(*first: float) -> torch.Tensor:
    found = torch.zeros(len(first), NUM_FEATURES)
    found[:, 0] = torch.tensor(first)
    return found


def test_images_are_read_by_colour_and_class(pairs: Pairs, reader: ImageReader) -> None:
    shirt = pairs.validation[0]
    assert reader.read(shirt, [RED, BLUE, RED], features(1, 1, -1)) == [
        Right(True, True), Right(False, True), Right(True, False),
    ]  # fmt: skip
    assert [right.both for right in reader.read(shirt, [RED, BLUE, RED], features(1, 1, -1))] == [True, False, False]
    skirt = pairs.validation[2]  # no class of the training captions
    assert reader.read(skirt, [BLUE], features(-1)) == [Right(True, None)]
    assert ImageReader(None, None, None).read(shirt, [RED], features()) == [Right(None, None)]


def test_shares_are_of_captions_that_state_it(pairs: Pairs, reader: ImageReader) -> None:
    real = [Right(True, True), Right(False, True), Right(True, None)]
    generated = [
        [Right(True, True), Right(False, True), Right(False, False), Right(False, True)],
        [Right(True, False), Right(True, True), Right(True, True), Right(True, True)],
        [Right(False, None)] * 4,
    ]
    found = reader.report(pairs.validation, real, generated)
    colour, shown, both = (found[f"{name}_agreement"] for name in ("colour", "class", "colour_and_class"))
    assert (colour["real"], colour["top_ranked"], colour["random"]) == (2 / 3, 2 / 3, 5 / 12)
    assert (colour["num_captions"], colour["names"], colour["commonest"]) == (3, 2, 2 / 3)
    assert (shown["real"], shown["num_real"], shown["top_ranked"], shown["random"]) == (1, 2, 0.5, 6 / 8)
    assert (shown["classes"], shown["commonest"], shown["num_captions"]) == (2, 0.5, 2)
    assert (both["real"], both["top_ranked"], both["random"]) == (0.5, 0.5, 0.5)
    assert both["top_ranked_minus_random"] == 0.0
    assert shown["top_ranked_minus_random"] == -0.25
    nothing = ImageReader(None, None, None).report(pairs.validation, real, generated)
    assert nothing == {}
