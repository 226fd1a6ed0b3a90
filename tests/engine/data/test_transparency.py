"""One colour that a PNG calls transparent is white, or the ground, wherever images come in."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.check import check
from engine.data.crops import open_image, open_layered, upright_rgb
from engine.data.pairs import load_image, load_pairs
from engine.data.prepare import prepare
from engine.data.sources import PrepareOptions
from engine.data.transparency import UnknownPixels, alpha_of, to_rgb
from engine.errors import InputError
from engine.pipeline.init_image import InitImage
from tests.raw_png import raw_png

WHITE, RED = (255, 255, 255), (200, 30, 40)


def keyed(kind: str) -> bytes:
    """8 x 8 pixels, the left half in a colour that is transparent, the right one not."""
    half = range(8)
    if kind == "RGB":
        return raw_png([[0, 0, 0] * 4 + [*RED] * 4 for _ in half], bits=8, channels=3, key=(0, 0, 0))
    if kind == "RGB of 16 bits":  # the right half differs in the low byte only
        return raw_png([[0, 0, 7] * 4 + [0, 0, 8] * 4 for _ in half], bits=16, channels=3, key=(0, 0, 7))
    if kind == "grey of 16 bits":
        return raw_png([[300] * 4 + [301] * 4 for _ in half], bits=16, key=(300,))
    if kind == "palette":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0, *RED])
        image.paste(1, (4, 0, 8, 8))
        file = io.BytesIO()
        image.save(file, "PNG", transparency=0)
        return file.getvalue()
    bits = int(kind.removeprefix("grey of ").removesuffix(" bits"))
    return raw_png([[1] * 4 + [0] * 4 for _ in half], bits=bits, key=(1,))


KINDS = ["RGB", "RGB of 16 bits", "palette", "grey of 16 bits", *(f"grey of {bits} bits" for bits in (1, 2, 4, 8))]
SHOWN = {"RGB": RED, "palette": RED, "grey of 16 bits": (1, 1, 1)}


def halves(image: Image.Image) -> tuple[object, object]:
    return image.getpixel((1, 4)), image.getpixel((6, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_white_wherever_it_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(keyed(kind))
    expected = (WHITE, SHOWN.get(kind, (0, 0, 0)))
    assert halves(open_image(path)) == expected
    assert halves(upright_rgb(Image.open(io.BytesIO(keyed(kind))))) == expected
    layered = open_layered(path).image
    assert (layered.getpixel((1, 4))[3], layered.getpixel((6, 4))[3]) == (0, 255)  # type: ignore[index]
    pixels = InitImage.from_files(path, keep_rows=1).pixels(8)
    assert (tuple(pixels[4, 1]), tuple(pixels[4, 6])) == expected
    (tmp_path / "a.txt").write_text("a")
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"b{number}.png")
        (tmp_path / f"b{number}.txt").write_text("b")
    pair = next(pair for pair in load_pairs(tmp_path).all if pair.key == "a")
    assert tuple(load_image(pair, 8)[4, 1]) == WHITE


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_the_ground_of_a_cut_out(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"{name}.png").write_bytes(keyed(kind))
        (tmp_path / "s" / f"{name}.txt").write_text("a")
    options = PrepareOptions(image_size=8, cut_out=True, ground="#00ff00", validation_fraction=0.0)
    assert prepare(tmp_path / "s", tmp_path / "out", options).cut_outs == 2
    with Image.open(tmp_path / "out" / "images" / "a.png") as image:
        assert image.getpixel((0, 4)) == (0, 255, 0)  # beside the object, which fills the height
    assert "transparent_image" not in check(tmp_path / "s").counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_with_a_transparent_colour_is_refused_as_other_transparent_masks_are(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "mask.png").write_bytes(keyed(kind))
    with pytest.raises(InputError, match="transparent pixels"):
        InitImage.from_files(tmp_path / "image.png", mask=tmp_path / "mask.png")


def test_a_key_that_no_pixel_has_hides_nothing() -> None:
    image = Image.open(io.BytesIO(raw_png([[1, 2, 3] * 4] * 4, bits=8, channels=3, key=(9, 9, 9))))
    alpha = alpha_of(image)
    assert alpha is not None
    assert alpha.min() == 255


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("LAB", (4, 4), (255, 128, 128)), WHITE),
        (Image.new("CMYK", (4, 4)), WHITE),
        (Image.new("1", (4, 4), 1), WHITE),
        (Image.new("La", (4, 4)), WHITE),
        (Image.new("RGBa", (4, 4)), WHITE),
        (Image.new("I", (4, 4), 65535), WHITE),
        (Image.new("HSV", (4, 4), (0, 0, 255)), WHITE),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_any_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert np.abs(np.subtract(to_rgb(image).getpixel((1, 1)), expected)).max() <= 1  # type: ignore[arg-type]


def test_floating_point_pixels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownPixels, match="floating-point"):
        to_rgb(Image.new("F", (4, 4)))
    Image.new("F", (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="floating-point"):
        open_image(tmp_path / "a.tif")
