"""Colours read back from images that were drawn in them."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engine.data.kfashion.colours import K_FASHION_COLOURS
from engine.data.kfashion.labels import VOCABULARY
from engine.metrics.colour import fit_colour_reader, srgb_to_lab, subject_colours

Colour = tuple[int, int, int]
LIGHT, DARK = (245, 245, 245), (70, 50, 40)


def image(ground: tuple[int, int, int], colour: tuple[int, int, int], *, size: int = 96) -> np.ndarray:
    """(S, S, 3): a shape of one colour that touches the lower edge, shaded and blurred as photos are."""
    pixels = np.empty((size, size, 3), np.float64)
    pixels[:] = ground
    part = slice(size // 4, 3 * size // 4)
    pixels[size // 5 :, part] = colour
    pixels *= np.linspace(0.92, 1.08, size)[:, None, None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return np.array(image)


def test_lab_of_known_colours() -> None:
    # D65 values as every colour calculator gives them
    known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 255): (32.30, 79.19, -107.86)}  # fmt: skip
    for rgb, lab in known.items():
        assert srgb_to_lab(np.array(rgb, np.uint8)) == pytest.approx(lab, abs=0.02)


@pytest.mark.parametrize("size", [5, 32, 64, 100])
def test_a_flat_image_is_of_its_own_colour(size: int) -> None:
    flat = np.full((size, size, 3), (185, 40, 50), np.uint8)
    lightness, a, b = srgb_to_lab(np.array((185, 40, 50), np.uint8))
    own = [0.8 * lightness, a, b]  # lightness counts less
    assert subject_colours(flat) == pytest.approx([*own, *own, *own, 0, 0, 0], abs=1e-9)


def test_a_reader_of_drawn_shapes_reads_every_name_on_other_grounds() -> None:
    def ground(colour: Colour, other: bool) -> Colour:
        return LIGHT if (srgb_to_lab(np.array(colour, np.uint8))[0] < 60) is not other else DARK

    names = list(K_FASHION_COLOURS)
    reader = fit_colour_reader([image(ground(colour, False), colour) for colour in K_FASHION_COLOURS.values()], names)
    found = [reader.name_of(image(ground(colour, False), colour, size=64)) for colour in K_FASHION_COLOURS.values()]
    assert found == names
    red = K_FASHION_COLOURS["레드"]
    for other in ((20, 20, 20), (60, 120, 70), (190, 180, 164)):
        assert reader.name_of(image(other, red)) == "레드"


def test_a_subject_of_the_grounds_colour_is_still_read() -> None:
    reader = fit_colour_reader([image(LIGHT, (38, 38, 40)), image(LIGHT, (222, 221, 217))], ["블랙", "화이트"])
    assert reader.name_of(image((216, 215, 211), (222, 221, 217))) == "화이트"


def test_several_near_photographs_outweigh_one_that_is_nearer() -> None:
    shades = [(122, 122, 122), (126, 126, 126), (127, 127, 127), (128, 128, 128)]
    reader = fit_colour_reader([image(LIGHT, shade) for shade in shades], ["블랙", "그레이", "그레이", "그레이"])
    assert reader.name_of(image(LIGHT, (123, 123, 123))) == "그레이"
    assert fit_colour_reader([image(LIGHT, shades[0])], ["블랙"]).name_of(image(LIGHT, (200, 0, 0))) == "블랙"


def test_the_median_is_that_of_the_heavier_half() -> None:
    half = np.full((32, 32, 3), 245, np.uint8)
    half[4:28, 4:28] = (185, 40, 50)
    half[4:28, 4:12] = (38, 38, 40)
    assert subject_colours(half)[6:9] == pytest.approx(subject_colours(np.full_like(half, (185, 40, 50)))[:3])


def test_same_image_same_colour() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (subject_colours(noise) == subject_colours(noise.copy())).all()


def test_faults() -> None:
    with pytest.raises(ValueError, match="uint8"):
        subject_colours(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(S, S, 3\)"):
        subject_colours(np.zeros((8, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="got 0 images"):
        fit_colour_reader([], [])
    with pytest.raises(ValueError, match="got 1 images, 2 names"):
        fit_colour_reader([np.zeros((8, 8, 3), np.uint8)], ["레드", "블루"])


def test_the_palette_has_the_label_formats_names() -> None:
    assert set(K_FASHION_COLOURS) == VOCABULARY["색상"]
    assert len(set(K_FASHION_COLOURS.values())) == 21
