"""Safe reading of training images, and square crops of the objects in them.

Owns the one guarded way to read an image file, and the arithmetic from a label's box to an image of size x size.
Pillow by itself only warns about a decompression bomb above 89 million pixels and raises above twice that; one such
file is 0.5 GB of RGB in every worker. Here the size in the header is checked before a pixel is decoded: above
`MAX_PIXELS` is a fault. A truncated JPEG is a fault too, not an image with a grey lower half.

x, y of a box is its top-left corner in pixels of the stored image. Some secondary material on K-Fashion calls it the
centre, so that reading is an explicit option.
"""

import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from engine.data.label_format import Box
from engine.errors import InputError

MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")

Origin = Literal["top_left", "center"]
ImageDefect = Literal["missing_image", "empty_file", "not_an_image", "broken_image", "oversize_image"]

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


def open_image(path: Path) -> Image.Image:
    """Reads an image file completely: RGB, upright (EXIF orientation applied), transparency on white.

    Raises:
        ImageFault: missing or empty file, not JPEG/PNG/WEBP, truncated or damaged, or above MAX_PIXELS pixels.
    """
    return _decode(path, upright_rgb)


def open_layered(path: Path) -> Image.Image:
    """`open_image` with transparency kept: RGBA, upright. Raises ImageFault."""
    return _decode(path, upright_rgba)


def _decode(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
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
            image.load()
            return convert(image)
    except ImageFault:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageFault("not_an_image", path, f"is not a {', '.join(IMAGE_FORMATS)} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # warning: under python -W error
        raise ImageFault("oversize_image", path, f"is too large to decode: {error}") from error
    except DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ImageFault("broken_image", path, f"is truncated or damaged: {reason}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: EXIF orientation applied, 16-bit grey scaled, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16-bit grey PNG: Pillow's own conversion clips at 255, which turns it white
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if _has_transparency(image):
        # dropping alpha instead would show what was hidden under it, usually black
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    return image.convert("RGB")


def upright_rgba(image: Image.Image) -> Image.Image:
    """Any mode to RGBA: EXIF orientation applied, 16-bit grey scaled; opaque without transparency of its own."""
    image = ImageOps.exif_transpose(image)
    return image.convert("RGBA") if _has_transparency(image) else upright_rgb(image).convert("RGBA")


def _has_transparency(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


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
        side = max(crop.width, crop.height)
        square = Image.new("RGB", (side, side), _edge_color(crop))
        square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
        crop = square
    if crop.size == (size, size):
        return crop
    return crop.resize((size, size), Image.Resampling.LANCZOS)


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
    pixels = np.asarray(image)  # (height, width, 3)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # (2 * width + 2 * height, 3)
    red, green, blue = np.median(edges, axis=0).round().astype(int).tolist()
    return red, green, blue
