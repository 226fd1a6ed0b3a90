"""Photographs that are stored turned (EXIF orientation), and the boxes and outlines of their labels.

Images are read upright. A label may have been drawn on the stored pixels or on the upright ones; the size that it states tells
which, where the two differ. Where they do not (orientations 2 to 4, squares, no size stated) it is taken to mean the stored
pixels, as AI Hub's own labels do.

Points of a photo of w x h stored pixels, upright:

    1 (x, y)    2 (w-x, y)    3 (w-x, h-y)    4 (x, h-y)    5 (y, x)    6 (h-y, x)    7 (h-y, w-x)    8 (y, w-x)
"""

import math
from typing import NamedTuple

from PIL import Image

from engine.data.label_format import Box, Outline

_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_READ_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)


class LabelFrame(NamedTuple):
    """How a label's coordinates become pixels of the upright photo.

    orientation: of the pixels that the label means; 1 where they are upright already.
    width, height: of the picture that the label was drawn on.
    x_scale, y_scale: upright pixels of the photo for one of the label's, turned.
    """

    orientation: int
    width: float
    height: float
    x_scale: float
    y_scale: float

    def outline(self, outline: Outline) -> Outline:
        return tuple(self._point(x, y) for x, y in outline)

    def box(self, box: Box, *, is_centred: bool) -> Box:
        """The box, x and y the same corner (or the centre) as before, of the upright photo."""
        if self == self._replace(orientation=1, x_scale=1.0, y_scale=1.0):
            return box  # bit for bit
        x_extent, y_extent = (box.height, box.width) if self.orientation >= 5 else (box.width, box.height)
        width, height = x_extent * self.x_scale, y_extent * self.y_scale
        if is_centred:
            return Box(*self._point(box.x, box.y), width, height)
        x, y = self._point(box.x + box.width / 2, box.y + box.height / 2)
        return Box(x - width / 2, y - height / 2, width, height)

    def _point(self, x: float, y: float) -> tuple[float, float]:
        right, below = self.width - x, self.height - y
        turned = (
            ((x, y), (right, y), (right, below), (x, below))
            + ((y, x), (below, x), (below, right), (y, right))
        )[self.orientation - 1]  # fmt: skip
        return turned[0] * self.x_scale, turned[1] * self.y_scale


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 to 8; 1 where there is none, or metadata that cannot be read."""
    try:
        orientation = image.getexif().get(_TAG, 1)
    except _READ_ERRORS:
        return 1
    return orientation if orientation in _TURNS else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image as it is meant to be seen, without the metadata that would have it turned once more."""
    if orientation not in _TURNS:
        return image
    turned = image.transpose(_TURNS[orientation])
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(name, None)
    return turned


def stored_size(upright: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) before turning; the same function gives the upright size of a stored one."""
    return (upright[1], upright[0]) if orientation >= 5 else upright


def size_difference(
    name: str, upright: tuple[int, int], orientation: int, labelled: tuple[int | None, int | None] | None
) -> str:
    """What a label and its photo say of the size, for reports."""
    width, height = ("?" if side is None else side for side in labelled or (None, None))
    stored = stored_size(upright, orientation)
    own = f"{stored[0]} x {stored[1]}"
    if stored != upright:
        own = f"stored as {own}, upright {upright[0]} x {upright[1]}"
    return f"label says {width} x {height}, {name} is {own}"


def label_frame(
    upright: tuple[int, int],
    orientation: int,
    labelled: tuple[int | None, int | None] | None,
    *,
    is_resized: bool = False,
) -> LabelFrame | None:
    """The frame of a label's coordinates; None for a size that is neither the stored photo's nor the upright one's.

    Args:
        upright: (width, height) of the photo.
        labelled: (width, height) that the label states; what it does not state fits.
        is_resized: photos were resized after labelling: the size that fits best by its proportions is scaled.
    """
    stored = stored_size(upright, orientation)
    width, height = labelled or (None, None)
    frames = []
    for size, turn in ((stored, orientation), (upright, 1)):
        stated = (width or size[0], height or size[1])
        x_scale, y_scale = (upright[i] / stored_size(stated, turn)[i] for i in (0, 1))
        frames.append(LabelFrame(turn, float(stated[0]), float(stated[1]), x_scale, y_scale))
        if stated == size:
            return frames[-1]
    if not is_resized:
        return None
    return min(frames, key=lambda frame: abs(math.log(frame.x_scale / frame.y_scale)))
