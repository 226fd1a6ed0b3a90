import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from engine.data.label_format import Attributes
from engine.data.synthetic.drawing import BACKGROUND, COLOURS, draw_garment
from engine.data.synthetic.garments import CATEGORIES, SLEEVES, all_choices
from engine.data.synthetic.oracle import NOTHING, Reading, read, score

SIDE = 64
Example = tuple[Image.Image, Attributes, tuple[int, int, int, int]]  # image, its attributes, its box


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """1,008 drawings: each of the 144 triples seven times, other attributes at random."""
    generator = np.random.default_rng(20_260_101)
    made = []
    for _ in range(7):
        for drawn in CATEGORIES:
            for colour in COLOURS:
                for third in drawn.third:
                    choices = all_choices(drawn, colour, third)
                    _, attributes = choices[int(generator.integers(len(choices)))]
                    drawing = draw_garment(attributes, generator=generator, image_size=SIDE)
                    covered = Image.fromarray((drawing.coverage >= 128).astype(np.uint8))
                    box = covered.getbbox()
                    assert box is not None
                    made.append((drawing.image, attributes, box))
    return made


def _shares(images: list[Image.Image], attributes: list[Attributes]) -> dict[str, float]:
    scores = score([read(image) for image in images], attributes)
    return {key: float(np.mean([each[key] for each in scores])) for key in scores[0]}


def _levels(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _blurred(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1))


def _noisy(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    return _levels(np.asarray(image) + generator.normal(0, 8, (SIDE, SIDE, 3)))


def _jpeg(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def _shifted(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    return _levels(np.asarray(image, dtype=float) + generator.choice([-6, 6], 3))


@pytest.mark.slow
def test_drawings_of_any_seed_are_read_right(examples: list[Example]) -> None:
    shares = _shares([image for image, _, _ in examples], [attributes for _, attributes, _ in examples])
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.slow
def test_crops_to_the_box_are_read_right(examples: list[Example]) -> None:
    some = examples[::2]
    crops = [image.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image, _, box in some]
    shares = _shares(crops, [attributes for _, attributes, _ in some])
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.slow
@pytest.mark.parametrize("degrade", [_blurred, _noisy, _jpeg, _shifted])
def test_degraded_drawings_are_read_right(
    examples: list[Example], degrade: Callable[[Image.Image, np.random.Generator], Image.Image]
) -> None:
    generator = np.random.default_rng(1)
    some = examples[1::3]
    shares = _shares([degrade(image, generator) for image, _, _ in some], [attributes for _, attributes, _ in some])
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.slow
def test_other_sizes_arrays_and_modes_are_read_alike(examples: list[Example]) -> None:
    for image, attributes, _ in examples[:144:12]:
        assert read(np.asarray(image)) == read(image) == read(image.convert("RGBA"))
        large = draw_garment(attributes, generator=np.random.default_rng(0), image_size=128).image
        assert score([read(large)], [attributes])[0]["all"], attributes


@pytest.mark.parametrize("value", [0, 40, 128, 250, 255, BACKGROUND, *(cloth for cloth, _ in COLOURS.values())])
def test_blank_images_show_nothing(value: int | tuple[int, int, int]) -> None:
    assert read(np.full((SIDE, SIDE, 3), value, dtype=np.uint8)) == NOTHING


def test_noise_shows_nothing() -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        assert read(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) == NOTHING
        coarse = _levels(generator.integers(0, 256, (8, 8, 3))).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        assert read(coarse) == NOTHING


def _accepted(images: list[Image.Image]) -> float:
    """The share of examples in which any field is read."""
    return float(np.mean([read(image) != NOTHING for image in images]))


@pytest.mark.slow
def test_rectangles_show_nothing() -> None:
    generator = np.random.default_rng(3)
    images = []
    for _ in range(300):
        image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
        cloth, _ = list(COLOURS.values())[int(generator.integers(len(COLOURS)))]
        left, top = generator.integers(0, 24, 2).tolist()
        right, bottom = generator.integers(40, 64, 2).tolist()
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), fill=cloth)
        images.append(image)
    assert _accepted(images) <= 0.01


def test_halves_of_garments_show_nothing(examples: list[Example]) -> None:
    images = []
    for image, _, _ in examples[:144:2]:
        for half in ((0, 0, 32, 64), (32, 0, 64, 64), (0, 0, 64, 32), (0, 32, 64, 64)):
            gone = image.copy()
            gone.paste(BACKGROUND, half)
            images.append(gone)
    assert _accepted(images) <= 0.01


def test_two_garments_in_one_picture_are_refused(examples: list[Example]) -> None:
    generator = np.random.default_rng(4)
    images: list[Image.Image] = []
    while len(images) < 300:
        (one, stated, _), (two, other, _) = (
            examples[int(index)] for index in generator.integers(len(examples), size=2)
        )
        if stated["카테고리"] != other["카테고리"]:
            images.append(Image.blend(one, two, 0.5))
    assert _accepted(images) <= 0.05


def test_garments_that_fade_into_the_background_are_refused(examples: list[Example]) -> None:
    """Not all: the middle between the background and white or pink is still rather white or pink."""
    blank = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    assert _accepted([Image.blend(image, blank, 0.5) for image, _, _ in examples[:144]]) <= 0.10


def test_wrong_attributes_are_found(examples: list[Example]) -> None:
    """An image scored against another label fails in exactly the field that differs."""
    some = examples[:144]
    readings = [read(image) for image, _, _ in some]
    generator = np.random.default_rng(5)
    values = {"카테고리": [drawn.category for drawn in CATEGORIES], "색상": list(COLOURS), "소매기장": list(SLEEVES)}
    for key, field in (("카테고리", "category"), ("색상", "colour"), ("소매기장", "sleeve")):
        relabelled = []
        for _, attributes, _ in some:
            others = [value for value in values[key] if value != attributes.get(key)]
            change = {key: str(generator.choice(others))} if key in attributes else {}
            relabelled.append({**attributes, **change})
        for (_, attributes, _), each in zip(some, score(readings, relabelled), strict=True):
            if key in attributes:
                assert not each[field]
                assert not each["all"]
            elif field == "sleeve":
                assert each["sleeve"] == each["category"]


def test_score_counts_an_unlabelled_sleeve_by_the_category() -> None:
    stated: Attributes = {"garment": "하의", "카테고리": "팬츠", "색상": "블루", "기장": "발목"}
    right = Reading(category="팬츠", colour="블루", sleeve=None)
    wrong = Reading(category="스커트", colour="블루", sleeve=None)
    assert score([right], [stated]) == [{"colour": True, "category": True, "sleeve": True, "all": True}]
    assert score([wrong], [stated]) == [{"colour": True, "category": False, "sleeve": False, "all": False}]
    assert not any(score([NOTHING], [stated])[0].values())
    assert not any(score([NOTHING], [{}])[0].values())
    with pytest.raises(ValueError, match="zip"):
        score([right, wrong], [stated])
