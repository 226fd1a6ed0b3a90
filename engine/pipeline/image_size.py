"""Sizes of images larger than a model's own: how they are written, which there are, and how such an image is ranked.

Without torch, so that a size can be checked before any model is loaded.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import InputError

MOST_TIMES = 8  # the trained size, along each side: 225 windows of half a window's step
_WRITTEN = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class ImageSize(NamedTuple):
    """Pixels: width first, as OpenAI's API and image files have it."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str, *, field: str) -> ImageSize:
    """`192x128`: 192 pixels wide, 128 high.

    Raises:
        InputError: another form.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise InputError(field, text, "write WIDTHxHEIGHT in pixels, e.g. 192x128 (192 wide, 128 high)")
    return ImageSize(int(found[1]), int(found[2]))


def larger_size(size: ImageSize | None, *, image_size: int, grid_size: int, field: str = "size") -> ImageSize | None:
    """A size as a model generates it; None: its own, which is generated plainly.

    Args:
        image_size, grid_size: the model's pixels and image tokens along a side.

    Raises:
        InputError: a side shorter than the model's own, more than eight times as long, or not of whole tokens.
    """
    if size is None or size == (image_size, image_size):
        return None
    cell, most = image_size // grid_size, MOST_TIMES * image_size
    if min(size) < image_size or max(size) > most:
        remedy = f"this model generates {image_size}x{image_size}: each side must be {image_size} to {most} pixels"
        raise InputError(field, size, remedy)
    if size.width % cell or size.height % cell:
        near = ImageSize(*(max(image_size, min(most, round(side / cell) * cell)) for side in size))
        raise InputError(field, size, f"a token of this model is {cell} pixels wide and high: write {near}")
    return size


def squares(width: int, height: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the squares that cover an image, as few as do, evenly spread along its longer side.

    Rankers take squares: a long image as a whole would be squeezed, and its middle square alone would leave the ends unseen.
    """
    side, longer = min(width, height), max(width, height)
    count = -(-longer // side)
    for number in range(count):
        start = (longer - side) * number // max(1, count - 1)
        along = slice(start, start + side)
        yield (slice(0, side), along) if width > height else (along, slice(0, side))
