"""Safe reading of training images, and square crops of the objects in them.

Owns the one guarded way to read an image file, and the arithmetic from a label's box to an image of size x size.
Pillow by itself only warns about a decompression bomb above 89 million pixels and raises above twice that; one such
file is 0.5 GB of RGB in every worker. Here the size in the header is checked before a pixel is decoded: above
`MAX_PIXELS` is a fault. A truncated JPEG is a fault too, not an image with a grey lower half.

x, y of a box is its top-left corner in pixels of the upright image (engine/data/orientation.py turns labels). Some secondary material on K-Fashion calls it the
centre, so that reading is an explicit option.
"""

import math
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from engine.data.label_format import Box
from engine.data.orientation import orientation_of, turn_upright
from engine.data.transparency import UnknownPixels, to_rgb, to_rgba
from engine.errors import InputError

MAX_PIXELS = 50_000_000
_LARGE = 16_000_000  # pixels from which a JPEG is decoded smaller
# A closed list: Pillow has decoders for formats that no camera writes. MPO, a JPEG with more behind it, is JPEG here.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

Origin = Literal["top_left", "center"]
ImageDefect = Literal["missing_image", "empty_file", "not_an_image", "animated_image", "broken_image", "oversize_image"]

# What Pillow's decoders raise on damaged bytes (tests feed them mutated files).
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class ImageFault(InputError):
    """An image file that cannot be used; `defect` is one word for reports, `remedy` says what is wrong with it."""

    def __init__(self, defect: ImageDefect, path: Path, remedy: str) -> None:
        self.defect: ImageDefect = defect
        self.path = path
        super().__init__("image", path, remedy)

    def __reduce__(self) -> tuple[type["ImageFault"], tuple[ImageDefect, Path, str]]:
        return ImageFault, (self.defect, self.path, self.remedy)  # pickled between prepare's worker processes


class PixelBox(NamedTuple):
    """A rectangle of whole pixels inside an image; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return max(0, self.right - self.left) * max(0, self.bottom - self.top)


class Photo(NamedTuple):
    """A decoded image, upright, and the EXIF orientation that it was stored in (engine/data/orientation.py)."""

    image: Image.Image
    orientation: int


def open_image(path: Path, *, for_size: int | None = None, keep_aspect: bool = False) -> Image.Image:
    """Reads an image file completely: RGB, upright (EXIF orientation applied), transparency on white.

    Args:
        for_size: all of it will be brought to so many pixels: a very large JPEG may be decoded smaller.
        keep_aspect: it will be padded to a square before.

    Raises:
        ImageFault: missing or empty file, none of IMAGE_FORMATS, animated, truncated or damaged, or above MAX_PIXELS pixels.
    """
    shrink = None if for_size is None else partial(_shrink_while_decoding, size=for_size, keep_aspect=keep_aspect)
    return _decode(path, to_rgb, shrink).image


def check_image(path: Path) -> None:
    """Decodes an image to its last row, a JPEG at an eighth of its size, which is enough to find every fault.

    Raises:
        ImageFault: as `open_image`.
    """
    _decode(path, to_rgb, lambda image: image.draft(image.mode, (1, 1)))


def open_photo(path: Path) -> Photo:
    """`open_image` with the orientation in which it was stored. Raises ImageFault."""
    return _decode(path, to_rgb)


def open_layered(path: Path) -> Photo:
    """`open_photo` with transparency kept: RGBA, upright. Raises ImageFault."""
    return _decode(path, to_rgba)


def _decode(
    path: Path,
    convert: Callable[[Image.Image], Image.Image],
    shrink: Callable[[Image.Image], object] | None = None,
) -> Photo:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise ImageFault("missing_image", path, "no such file: check its name") from error
    if size_bytes == 0:
        raise ImageFault("empty_file", path, "the file is empty (0 bytes)")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                reason = f"{image.width} x {image.height} is more than {MAX_PIXELS / 1e6:.0f} million pixels: shrink it"
                raise ImageFault("oversize_image", path, reason)
            if is_animated(image):
                raise ImageFault("animated_image", path, "is animated: save one picture of it")
            if shrink is not None:
                shrink(image)
            # Pillow turns TIFFs by itself. Others are not asked before: a PNG would be decoded for the answer.
            turned = orientation_of(image) if image.format == "TIFF" else 1
            converted = convert(image)
            orientation = orientation_of(image)
            return Photo(turn_upright(converted, orientation), turned if orientation == 1 else orientation)
    except ImageFault:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageFault("not_an_image", path, f"is not a {', '.join(IMAGE_FORMATS)} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # warning: under python -W error
        raise ImageFault("oversize_image", path, f"is too large to decode: {error}") from error
    except UnknownPixels as error:
        raise ImageFault("not_an_image", path, error.remedy) from error
    except DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ImageFault("broken_image", path, f"is truncated or damaged: {reason}") from error


class Header(NamedTuple):
    """What an image file says of itself before it is decoded; the size is that of the stored pixels."""

    width: int
    height: int
    may_be_transparent: bool


def read_header(path: Path) -> Header | None:
    """The header of an image file; None where it cannot be read (`open_image` says why)."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return Header(*image.size, image.has_transparency_data)
    except (*DECODE_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def is_animated(image: Image.Image) -> bool:
    """Whether an opened file shows several pictures one after another. Others that hold several, as phones' MPO and scanners'
    TIFF, stand for their first."""
    return image.format not in ("MPO", "TIFF") and bool(getattr(image, "is_animated", False))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: EXIF orientation applied, 16-bit grey scaled, transparency on white."""
    converted = to_rgb(image)
    return turn_upright(converted, orientation_of(image))


def _shrink_while_decoding(image: Image.Image, size: int, keep_aspect: bool) -> None:
    """Lets libjpeg drop detail that resizing would drop anyway; smaller images are resized from all their pixels."""
    if image.width * image.height > _LARGE and image.format in ("JPEG", "MPO"):
        longer = max(image.size) if keep_aspect else None
        wanted = [max(1, 2 * size * side // (longer or side)) for side in image.size]
        image.draft(image.mode, (wanted[0], wanted[1]))


def pixel_box(
    box: Box, image_width: int, image_height: int, *, origin: Origin = "top_left", margin: float = 0.0
) -> tuple[PixelBox | None, str]:
    """Clamps a label's box to the image and rounds it to whole pixels.

    Args:
        box: as labelled, in pixels.
        image_width: pixels.
        image_height: pixels.
        origin: the point that x, y of the box mean.
        margin: added on each side, as a share of the box's longer side, before clamping.

    Returns:
        The box and "", or None and the reason why it cannot be used. A box with an area of at most one pixel after
        clamping is dropped (real labels have such boxes), whatever the margin.
    """
    if not all(math.isfinite(number) for number in box):
        return None, f"box {_shown(box)} has a number that is not finite"
    if box.width < 0 or box.height < 0:
        return None, f"box {_shown(box)} has a negative size"
    left, top = box.x, box.y
    if origin == "center":
        left, top = box.x - box.width / 2, box.y - box.height / 2
    bare = _clamped(left, top, left + box.width, top + box.height, image_width, image_height)
    if bare.area <= 1:
        if box.width * box.height <= 1:
            return None, f"box {_shown(box)} has no area"
        return None, f"box {_shown(box)} covers no more than a pixel of the image of {image_width} x {image_height}"
    extra = margin * max(box.width, box.height)
    right, bottom = left + box.width + extra, top + box.height + extra
    return _clamped(left - extra, top - extra, right, bottom, image_width, image_height), ""


def crop_and_resize(image: Image.Image, box: PixelBox | None, size: int, *, keep_aspect: bool = False) -> Image.Image:
    """Cuts `box` out of `image` (None: all of it) and brings it to size x size, antialiased (LANCZOS).

    The published data are stretched to the square. With `keep_aspect` the crop is first padded to a square, centred,
    with the median colour of its edge pixels, so that proportions survive and a plain background continues.
    """
    crop = image.crop(box) if box is not None else image
    if keep_aspect and crop.width != crop.height:
        edge_color = _edge_color(crop)
        crop = crop.reduce(square_reduction(max(crop.size), size))
        side = max(crop.width, crop.height)
        square = Image.new("RGB", (side, side), edge_color)
        square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
        crop = square
    if crop.size == (size, size):
        return crop
    return crop.resize((size, size), Image.Resampling.LANCZOS)


def square_reduction(side: float, size: int) -> int:
    """The whole number by which an image is made smaller before it is padded to a square of `side` pixels: 1, unless that
    would have more than MAX_PIXELS. At least four times `size`, to which the square is brought, are left."""
    return 1 if side**2 <= MAX_PIXELS else max(1, int(side) // (4 * size))


def _shown(box: Box) -> str:
    return f"(x {box.x:g}, y {box.y:g}, width {box.width:g}, height {box.height:g})"


def _clamped(left: float, top: float, right: float, bottom: float, image_width: int, image_height: int) -> PixelBox:
    def whole(number: float, limit: int) -> int:
        # floor(x + 0.5), not round(): round-half-even would move 10.5 and 11.5 by different amounts
        return math.floor(min(max(number, 0.0), float(limit)) + 0.5)

    return PixelBox(
        whole(left, image_width), whole(top, image_height), whole(right, image_width), whole(bottom, image_height)
    )


def _edge_color(image: Image.Image) -> tuple[int, int, int]:
    right, bottom = image.size
    edges = [(0, 0, right, 1), (0, bottom - 1, right, bottom), (0, 0, 1, bottom), (right - 1, 0, right, bottom)]
    pixels = np.concatenate([np.asarray(image.crop(edge)).reshape(-1, 3) for edge in edges])
    red, green, blue = np.median(pixels, axis=0).round().astype(int).tolist()
    return red, green, blue
