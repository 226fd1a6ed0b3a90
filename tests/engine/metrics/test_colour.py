"""Colours read back from images that were drawn in them."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engine.data.kfashion.colours import K_FASHION_COLOURS
from engine.data.kfashion.labels import VOCABULARY
from engine.metrics.colour import Lab, dominant_colour, lab_palette, nearest_colour_name, srgb_to_lab

PALETTE = lab_palette(K_FASHION_COLOURS)


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
    assert dominant_colour(flat) == pytest.approx(PALETTE["레드"], abs=1e-9)


def test_every_name_is_read_back_from_a_drawn_shape() -> None:
    for name, colour in K_FASHION_COLOURS.items():
        ground = (245, 245, 245) if PALETTE[name].lightness < 60 else (70, 50, 40)
        found = dominant_colour(image(ground, colour))
        assert nearest_colour_name(found, PALETTE) == name, (name, found, PALETTE[name])


def test_the_ground_does_not_matter() -> None:
    red = K_FASHION_COLOURS["레드"]
    for ground in ((245, 245, 245), (20, 20, 20), (60, 120, 70), (190, 180, 164)):
        assert nearest_colour_name(dominant_colour(image(ground, red)), PALETTE) == "레드"


def test_a_subject_of_the_grounds_colour_is_still_read() -> None:
    assert nearest_colour_name(dominant_colour(image((216, 215, 211), (222, 221, 217))), PALETTE) == "화이트"


def test_same_image_same_colour() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert dominant_colour(noise) == dominant_colour(noise.copy())


def test_of_equally_near_names_the_first() -> None:
    palette = {"b": Lab(50, 10, 0), "a": Lab(50, -10, 0)}
    assert nearest_colour_name(Lab(50, 0, 0), palette) == "b"


def test_faults() -> None:
    with pytest.raises(ValueError, match="uint8"):
        dominant_colour(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(S, S, 3\)"):
        dominant_colour(np.zeros((8, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="empty"):
        nearest_colour_name(Lab(50, 0, 0), {})


def test_the_palette_has_the_label_formats_names() -> None:
    assert set(K_FASHION_COLOURS) == VOCABULARY["색상"]
    assert len(set(K_FASHION_COLOURS.values())) == 21
