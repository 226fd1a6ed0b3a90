"""Transparency in all its kinds as an alpha channel, and any mode of pixels as RGB or RGBA.

A PNG without alpha may name one colour that is transparent (tRNS): what is hidden under it is usually black, and showed where
Pillow left the image as it was (RGB), compared the key with other numbers (grey of 1, 2, 4 bits, which it spreads to 8), or had
only half of each sample (RGB of 16 bits).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from engine.errors import InputError

WHITE = (255, 255, 255, 255)
_GREY_BITS = {"1": 1, "L;2": 2, "L;4": 4}  # by Pillow's name of the stored form


class UnknownPixels(InputError):
    """Pixels that are not colours of a screen."""


def with_alpha(image: Image.Image) -> Image.Image:
    """The loaded image, its transparent colour turned into an alpha channel if it names one.

    Args:
        image: best as it was opened: once Pillow has decoded a PNG, it no longer knows how many bits a sample had.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    stored = tiles[0].args if tiles else ""
    file = getattr(image, "filename", "") or getattr(image, "fp", None)
    image.load()
    if key is None or image.mode not in ("1", "L", "I;16", "I", "RGB"):
        return image  # an alpha channel or a palette: Pillow converts these
    if image.mode == "RGB":
        pixels = np.asarray(image)  # (height, width, 3)
        hidden = (pixels == [sample >> 8 if stored == "RGB;16B" else sample & 255 for sample in key]).all(axis=2)
        if stored == "RGB;16B":
            hidden &= (_low_bytes(file) == [sample & 255 for sample in key]).all(axis=2)
        return _joined(image, hidden)
    if image.mode in ("I;16", "I"):
        return _joined(Image.fromarray(_grey(image)), np.asarray(image) == key)
    bits = _GREY_BITS.get(stored, 1 if image.mode == "1" else 8)
    most = 2**bits - 1
    grey = image.convert("L")
    return _joined(grey, np.asarray(grey) == (key & most) * 255 // most)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image to RGB, transparency on white: dropping alpha instead would show what was hidden under it.

    Raises:
        UnknownPixels: floating-point pixels.
    """
    image = with_alpha(image)
    if not image.has_transparency_data:
        return _opaque_rgb(image)
    layered = _rgba(image)
    return Image.alpha_composite(Image.new("RGBA", layered.size, WHITE), layered).convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image:
    """Any image to RGBA, opaque without transparency of its own. Raises UnknownPixels."""
    image = with_alpha(image)
    return _rgba(image) if image.has_transparency_data else _opaque_rgb(image).convert("RGBA")


def alpha_of(image: Image.Image) -> NDArray[np.uint8] | None:
    """(height, width): how opaque each pixel is; None for an image without transparency."""
    image = with_alpha(image)
    return np.asarray(_rgba(image).getchannel("A")) if image.has_transparency_data else None


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255, which turns it white
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "F":
        raise UnknownPixels("image", image.mode, "its pixels are floating-point numbers: save it with 8 bits a channel")
    if image.mode == "LAB":  # Pillow has no conversion, LittleCMS has
        srgb = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert srgb is not None  # of an image that is not changed in place
        return srgb
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    return image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    return (np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)


def _low_bytes(file: Any) -> NDArray[np.uint8]:
    """(height, width, 3): the second byte of each 16-bit sample of a PNG, of which Pillow reads the first."""
    if hasattr(file, "seek"):
        file.seek(0)
    with Image.open(file, formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # the other byte comes first in this form
        return np.array(image)


def _joined(opaque: Image.Image, hidden: NDArray[np.bool_]) -> Image.Image:
    joined = opaque.copy()
    joined.info.pop("transparency", None)
    joined.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return joined
