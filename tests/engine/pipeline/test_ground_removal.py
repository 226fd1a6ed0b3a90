"""Cut-outs of generated images: known shapes of known softness on a known ground, and the shipped model's ground."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.data.ground import DEFAULT_GROUND, ground_rgb
from engine.pipeline.ground_removal import has_ground, remove_ground

SIZE, SAMPLES = 96, 8
EVERYWHERE = np.ones((SIZE, SIZE), bool)


def shape(*, hole: bool = False) -> np.ndarray:
    """(S, S): a garment's outline, body and two straps of two pixels, as shares of covered pixels."""
    mask = Image.new("L", (SIZE * SAMPLES, SIZE * SAMPLES))
    draw = ImageDraw.Draw(mask)
    draw.ellipse([value * SAMPLES for value in (20.3, 30.6, 75.2, 88.4)], fill=255)
    for left in (33, 60):
        draw.rectangle([left * SAMPLES, 10 * SAMPLES, (left + 2) * SAMPLES, 40 * SAMPLES], fill=255)
    if hole:
        draw.ellipse([value * SAMPLES for value in (40, 50, 56, 66)], fill=0)
    return np.asarray(mask.reduce(SAMPLES), np.float32) / 255


def on_ground(covered: np.ndarray, colour: tuple[int, int, int], *, noise: float = 1.0) -> Image.Image:
    """The shape in one colour on the ground, with a codec's noise of a grey level or so."""
    share = covered[..., None]
    pixels = share * np.array(colour) + (1 - share) * np.array(ground_rgb(DEFAULT_GROUND))
    pixels = pixels + np.random.default_rng(3).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def layers(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Colours (S, S, 3) and alpha (S, S) of its cut-out."""
    cut = remove_ground(image, DEFAULT_GROUND)
    assert (cut.mode, cut.size) == ("RGBA", image.size)
    values = np.asarray(cut, np.float32)
    return values[..., :3], values[..., 3] / 255


@pytest.mark.parametrize("colour", [(20, 20, 24), (200, 30, 40), (70, 110, 190), (150, 150, 150)])
def test_the_alpha_is_the_share_that_the_object_covers_and_the_colour_its_own(colour: tuple[int, int, int]) -> None:
    covered = shape()
    colours, alpha = layers(on_ground(covered, colour))
    assert np.abs(alpha - covered).max() < 0.16  # a ground within 7 levels of an object's 90 counts as ground
    edge = (covered > 0.3) & (covered < 0.9)
    assert edge.sum() > 60, "straps and outline"
    assert np.abs(alpha - covered)[edge].mean() < 0.03
    assert np.abs(colours - colour)[edge].mean() < 4, "no rim of the ground, on whatever it is laid"


def test_laid_back_on_its_ground_it_is_the_image() -> None:
    image = on_ground(shape(), (60, 40, 90))
    plain = Image.new("RGBA", image.size, (*ground_rgb(DEFAULT_GROUND), 255))
    again = Image.alpha_composite(plain, remove_ground(image, DEFAULT_GROUND)).convert("RGB")
    assert np.abs(np.asarray(again, float) - np.asarray(image, float)).mean() < 1.5


def test_what_the_object_encloses_stays_and_pale_cloth_keeps_its_body() -> None:
    _, alpha = layers(on_ground(shape(hole=True), (20, 90, 60)))
    assert (alpha[52:64, 44:52] == 1).all(), "a print in the ground's colour"
    _, alpha = layers(on_ground(shape(), (255, 255, 253)))
    covered = shape()
    assert alpha[covered == 1].mean() > 0.97
    assert alpha[covered == 0].mean() < 0.02
    assert 0 < alpha[(covered > 0) & (covered < 1)].mean() < 1, "a soft edge"


def test_a_fold_of_the_grounds_colour_lets_no_ground_in() -> None:
    pixels = np.array(on_ground(shape(), (255, 255, 253), noise=0))
    pixels[60:, 47:49] = ground_rgb(DEFAULT_GROUND)  # two pixels wide, from the body out to the ground
    _, alpha = layers(Image.fromarray(pixels))
    assert (alpha[62:80, 47:49] == 1).all()


def test_the_codecs_specks_go_and_an_empty_image_is_empty() -> None:
    pixels = np.array(on_ground(shape(), (20, 20, 24)))
    pixels[:2, :2] = pixels[90:92, 5] = 128
    colours, alpha = layers(Image.fromarray(pixels))
    assert alpha[:4, :4].max() == alpha[88:94, 3:8].max() == 0
    assert colours[:4, :4].max() == 0, "nothing is hidden under what is clear"
    _, alpha = layers(Image.new("RGB", (SIZE, SIZE), DEFAULT_GROUND))
    assert alpha.max() == 0


def test_an_image_on_another_ground_has_none() -> None:
    photo = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    ours = np.array(on_ground(shape(), (200, 30, 40)))
    assert has_ground(ours, DEFAULT_GROUND, where=EVERYWHERE)
    assert has_ground(np.full_like(ours, 255), DEFAULT_GROUND, where=EVERYWHERE), "white, as shops have it"
    assert not has_ground(photo, DEFAULT_GROUND, where=EVERYWHERE)
    inner = EVERYWHERE.copy()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    assert has_ground(photo, DEFAULT_GROUND, where=inner), "its border is regenerated"
