"""Cut-outs: an object without its background, on a plain ground.

An object's outline (a label's polygon, or the alpha of a PNG or WEBP) becomes a mask with a soft edge of one pixel; the
outline's extent plus a margin becomes a square with its proportions kept, and everything outside the outline is exactly
the ground's colour. Colours are weighed by the mask when the picture is resized, and the filter (bicubic) leaves no halo on
the ground. The outermost pixel inside a polygon goes with the background: it shows a bit of both, and left in it rims
pale objects with the colour of what they lay on.

Polygons are filled by the even-odd rule, which real labels need: hand-drawn outlines cross themselves now and then.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from engine.data.crops import PixelBox, square_reduction
from engine.data.label_format import Outline

OUTSIDE_TOLERANCE = 0.02  # of the photo's longer side; points that lie farther outside are a fault
LEAST_FILL = 0.05  # of the outline's extent; less is a line, or an outline that crosses itself wrongly
LEAST_WIDTH = 3.0  # pixels, in the mean
LEAST_OVERLAP = 0.5  # intersection over union of the outline's extent and the box

_SAMPLES = 4  # a pixel side
_STRIP = 256  # rows of the mask that are drawn at a time, which bounds the memory
_VISIBLE = 13  # of 255: fainter pixels, such as specks and far ends of shadows, do not widen the extent

MOST_POINTS = 10_000  # of an outline; hand-drawn ones have some hundreds
_PAIRS = 1 << 20  # of sides that are compared at a time, which bounds the memory

OutlineDefect = Literal["outline_outside_image", "zero_area_outline", "outline_off_box", "long_outline"]


class OutlineFault(NamedTuple):
    """Why an outline cannot be used; `defect` is one word for reports."""

    defect: OutlineDefect
    reason: str


class Extent(NamedTuple):
    """The rectangle that an object fills, in (possibly fractional) pixels of its image."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


class Layer(NamedTuple):
    """An object without its background: `image` is RGBA, `extent` is in its pixels."""

    image: Image.Image
    extent: Extent


def fit_outline(outline: Outline, width: int, height: int, box: PixelBox | None = None) -> Outline | OutlineFault:
    """An outline moved into the image, or why it cannot be used.

    Args:
        outline: at least three points, in pixels of the image.
        width, height: of the image.
        box: of the same object, within the image.

    Returns:
        The outline with points that lie a little outside moved to the edge. A fault: points far outside, an outline that
        fills next to nothing of its own extent (a line, or one that crosses itself wrongly), or one that the box
        contradicts, as another object's does; or more than `MOST_POINTS` points.
    """
    if len(outline) > MOST_POINTS:
        return OutlineFault("long_outline", f"outline: has {len(outline):,} points, more than {MOST_POINTS:,}")
    tolerance = max(2.0, OUTSIDE_TOLERANCE * max(width, height))
    inside = []
    for x, y in outline:
        if not (-tolerance <= x <= width + tolerance and -tolerance <= y <= height + tolerance):
            reason = f"outline: point ({x:g}, {y:g}) is outside the image of {width} x {height}"
            return OutlineFault("outline_outside_image", reason)
        inside.append((min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))))
    fitted = tuple(inside)
    extent = outline_extent(fitted)
    fill = _fill(fitted, extent)
    if fill < LEAST_FILL:
        reason = f"outline: fills {fill:.1%} of its extent: it is a line, or crosses itself"
        return OutlineFault("zero_area_outline", reason)
    mean_width = 2 * fill * extent.area / _perimeter(fitted)
    if mean_width < LEAST_WIDTH:
        return OutlineFault("zero_area_outline", f"outline: is {mean_width:.1f} pixels wide")
    if box is not None:
        overlap = _overlap(extent, Extent(*box))
        if overlap < LEAST_OVERLAP:
            reason = f"outline: its extent {_shown(extent)} and the box {_shown(box)} overlap by {overlap:.0%} only"
            return OutlineFault("outline_off_box", reason)
    return fitted


def crosses_itself(outline: Outline) -> bool:
    """Whether two sides cross, each strictly between its ends; touching is no crossing. False above `MOST_POINTS`."""
    if len(outline) > MOST_POINTS:
        return False
    start = np.array(outline, dtype=np.float64)  # (N, 2)
    along = np.roll(start, -1, axis=0) - start
    small = 1e-9 * max(1.0, float(np.abs(start).max())) ** 2
    rows = max(1, _PAIRS // len(start))
    for first in range(0, len(start), rows):
        own, step = start[first : first + rows, None], along[first : first + rows, None]
        # on which side of each other's line a point lies: (rows, N)
        ends = _side(step, start[None] - own, small), _side(step, start[None] + along[None] - own, small)
        owns = _side(along[None], own - start[None], small), _side(along[None], own + step - start[None], small)
        if ((ends[0] * ends[1] < 0) & (owns[0] * owns[1] < 0)).any():
            return True
    return False


def _side(along: np.ndarray, to: np.ndarray, small: float) -> np.ndarray:
    cross: np.ndarray = along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]
    return np.where(np.abs(cross) <= small, 0.0, cross)


def outline_extent(outline: Outline) -> Extent:
    """The smallest rectangle around an outline."""
    xs, ys = [x for x, _ in outline], [y for _, y in outline]
    return Extent(min(xs), min(ys), max(xs), max(ys))


def outline_mask(outline: Outline, window: PixelBox) -> Image.Image:
    """How much of each pixel of `window` lies in the outline, one pixel inward: grey, 0 to 255, from 4 x 4 samples."""
    left, top = window.left - 1, window.top - 1  # a rim of nothing for the filter
    width, height = window.right + 1 - left, window.bottom + 1 - top
    mask = Image.new("L", (width, height))
    # whole samples: Pillow would round negative ones, above a strip, the other way
    samples = [(math.floor((x - left) * _SAMPLES), math.floor((y - top) * _SAMPLES)) for x, y in outline]
    for first in range(0, height, _STRIP):
        rows = min(_STRIP, height - first)
        strip = Image.new("L", (width * _SAMPLES, rows * _SAMPLES))
        ImageDraw.Draw(strip).polygon([(x, y - first * _SAMPLES) for x, y in samples], fill=255)
        mask.paste(strip.reduce(_SAMPLES), (0, first))
    grey = np.asarray(mask)
    rows = np.minimum(np.minimum(grey[:-2], grey[1:-1]), grey[2:])
    # Pillow's MinFilter(3), in a tenth of its time
    return Image.fromarray(np.minimum(np.minimum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))


def outlined_layer(photo: Image.Image, outline: Outline) -> Layer:
    """What the outline encloses.

    Args:
        photo: RGB.
        outline: as `fit_outline` returns it.
    """
    extent = outline_extent(outline)
    window = PixelBox(
        math.floor(extent.left), math.floor(extent.top), math.ceil(extent.right), math.ceil(extent.bottom)
    )
    layer = photo.crop(window)
    layer.putalpha(outline_mask(outline, window))
    left, top = window.left, window.top
    return Layer(layer, Extent(extent.left - left, extent.top - top, extent.right - left, extent.bottom - top))


def visible_layer(image: Image.Image) -> Layer | None:
    """What is visible of an RGBA image; None if nothing is."""
    bounds = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _VISIBLE)).getbbox()
    return None if bounds is None else Layer(image, Extent(*bounds))


def place_on_ground(layer: Layer, size: int, *, ground: tuple[int, int, int], margin: float = 0.0) -> Image.Image:
    """An RGB image of size x size with the object in its middle, proportions kept, and the ground around it.

    Args:
        layer: of the object.
        size: pixels.
        ground: sRGB, 0 to 255.
        margin: at least this much ground on each side, as a share of the object's longer side.
    """
    extent = layer.extent
    side = max(extent.right - extent.left, extent.bottom - extent.top) * (1 + 2 * margin)
    reduction = square_reduction(side, size)
    if reduction > 1:
        small = Extent(*(place / reduction for place in extent))
        return place_on_ground(Layer(layer.image.reduce(reduction), small), size, ground=ground, margin=margin)
    left, top = (extent.left + extent.right - side) / 2, (extent.top + extent.bottom - side) / 2
    x, y = math.floor(left), math.floor(top)
    whole = layer.image.crop((x, y, math.ceil(left + side), math.ceil(top + side)))  # beyond the image: transparent
    # Pillow resizes RGBA weighed by alpha. Bicubic's only side lobe is negative, so it ends at alpha 0: no halo.
    square = whole.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left - x, top - y, left - x + side, top - y + side)
    )
    plain = Image.new("RGBA", (size, size), (*ground, 255))
    return Image.alpha_composite(plain, square).convert("RGB")


def _fill(outline: Outline, extent: Extent, grid: int = 128) -> float:
    """The share of its extent that an outline fills."""
    if not extent.area:
        return 0.0
    x_scale, y_scale = grid / (extent.right - extent.left), grid / (extent.bottom - extent.top)
    points = [((x - extent.left) * x_scale, (y - extent.top) * y_scale) for x, y in outline]
    drawn = Image.new("L", (grid, grid))
    ImageDraw.Draw(drawn).polygon(points, fill=255)
    return drawn.histogram()[-1] / grid**2


def _perimeter(outline: Outline) -> float:
    return sum(math.dist(start, end) for start, end in zip(outline, (*outline[1:], outline[0]), strict=True))


def _overlap(first: Extent, second: Extent) -> float:
    """Intersection over union."""
    shared = Extent(
        max(first.left, second.left),
        max(first.top, second.top),
        min(first.right, second.right),
        min(first.bottom, second.bottom),
    ).area
    return shared / (first.area + second.area - shared)


def _shown(rectangle: Extent | PixelBox) -> str:
    left, top, right, bottom = rectangle
    return f"({left:g}, {top:g} to {right:g}, {bottom:g})"
