"""Colour, category and sleeve read from an image of the demo set, to score a trained model's generations.

Nothing is trained and only pixels are read. The garment is what is not background; its pixels vote for its colour; category
and sleeve are those of the nearest of the demo set's own drawings in that colour. The garment's box is compared, stretched
to a square, so whole images and crops to the label's box read the same.

An image that is not clearly one demo garment is refused: a model must not score with something in between. The limits below
lie between drawn images (blurred, noisy, JPEG at quality 50, off by 6 levels) and nonsense (noise, blanks, rectangles,
halves of garments, averages of two).

    K: drawings in one colour, all categories, lengths, sleeves, prints and details.   P: pixels of a garment.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from engine.data.synthetic.drawing import BACKGROUND, COLOURS, draw_garment
from engine.data.synthetic.garments import CATEGORIES, all_choices

SIDE = 64  # images are read at this size
MARGIN = 4  # background added around an image, in pixels
GRID = 12  # drawings are compared at this size: shapes survive a small VQGAN, stitches and print edges do not

# Where the background ends, in levels of RGB.
LARGEST_BACKGROUND_DISTANCE = 24.0
# Every garment is drawn at least this wide and high, as a share of the side.
LEAST_EXTENT = 0.55
# A pixel is a mixture of a colour's cloth with its shade or print up to this distance, in levels of RGB.
LARGEST_COLOUR_DISTANCE = 42.0
# Of the garment's pixels: the share that votes for its colour, its lead over the next, and the share that is any
# mixture of the colour at all (worst 1 in 500 of degraded drawings: 0.51, 0.16, 0.73).
LEAST_COLOUR_SHARE = 0.42
LEAST_COLOUR_LEAD = 0.12
LEAST_EXPLAINED_SHARE = 0.70
# Root mean square difference from the nearest drawing, as a share of that drawing's contrast with the background, which
# counts as LEAST_CONTRAST levels at least: a light cloth differs little from it. Degraded drawings reach 0.14;
# rectangles start at 0.20, but most lie about as near to several categories (next limit).
LARGEST_ERROR = 0.26
LEAST_CONTRAST = 60.0
# By how much that error is below the least of any drawing of another category, or of another sleeve, as a share.
# Drawings lead by 0.52 and 0.46 at worst, averages of two garments of different colours by less than 0.28 nineteen times
# in twenty.
LEAST_CATEGORY_LEAD = 0.28
LEAST_SLEEVE_LEAD = 0.18
# Difference of the natural logarithms of width over height; looked at unless the garment fills the image.
LARGEST_ASPECT_ERROR = 0.14


@dataclass(frozen=True)
class Reading:
    """What an image shows; None where that is not clear, and for the sleeve of a category without sleeves."""

    category: str | None
    colour: str | None
    sleeve: str | None


NOTHING = Reading(category=None, colour=None, sleeve=None)


@dataclass(frozen=True)
class _Garment:
    """A garment found: `mask` and `is_ground` boolean (N, N), smoothed `pixels` float32 (N, N, 3), N = SIDE + 2 MARGIN.

    A pixel is neither where the ground shows another colour, or the garment's blurred edge.
    """

    mask: np.ndarray
    is_ground: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class _Drawings:
    """The demo set in one colour: `views` float32 (K, GRID² * 3) with their squared norms and aspects (K)."""

    views: np.ndarray
    squares: np.ndarray
    log_aspects: np.ndarray
    categories: np.ndarray
    sleeves: np.ndarray


def read(image: np.ndarray | Image.Image) -> Reading:
    """Reads one image.

    Args:
        image: uint8 (S, S, 3), or a PIL image.
    """
    garment = _find_garment(_pixels(image))
    if garment is None:
        return NOTHING
    # Every other pixel is plenty to vote.
    colour = _read_colour(garment.pixels[_neighbours(garment.mask) == 9][::2])
    if colour is None:
        return NOTHING
    category, sleeve = _read_shape(garment, colour)
    return NOTHING if category is None else Reading(category=category, colour=colour, sleeve=sleeve)


def score(readings: Sequence[Reading], attributes: Sequence[Mapping[str, str | list[str]]]) -> list[dict[str, bool]]:
    """Compares readings with the attributes of the caption.

    Args:
        readings: one an image.
        attributes: as many prepared pairs' attributes, such as {"카테고리": "티셔츠", "색상": "레드", "소매기장": "반팔"}.

    Returns:
        For each image whether colour, category, sleeve, and all of them are right. Without a sleeve in the attributes,
        it is right when the category is.
    """
    scores = []
    for reading, stated in zip(readings, attributes, strict=True):
        category = reading.category is not None and reading.category == stated.get("카테고리")
        colour = reading.colour is not None and reading.colour == stated.get("색상")
        sleeve = category if "소매기장" not in stated else reading.sleeve == stated["소매기장"]
        scores.append({"colour": colour, "category": category, "sleeve": sleeve, "all": colour and category and sleeve})
    return scores


def _pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    """Float32 (SIDE, SIDE, 3)."""
    resized = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    if resized.size != (SIDE, SIDE):
        resized = resized.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(resized, dtype=np.float32)


def _find_garment(pixels: np.ndarray) -> _Garment | None:
    """Separates garment and background; None when either is missing.

    Args:
        pixels: float32 (SIDE, SIDE, 3).
    """
    difference = _smoothed(pixels) - np.asarray(BACKGROUND, dtype=np.float32)
    level = difference.mean(axis=2)
    hue_error = np.abs(difference - level[:, :, None]).max(axis=2)
    is_likely = (hue_error < 14) & (np.abs(level) < 26)
    if is_likely.mean() < 0.04:
        return None
    ground = np.median(pixels[is_likely], axis=0)
    # With background all round, a crop to the garment's box looks like a whole image.
    padded = np.empty((SIDE + 2 * MARGIN, SIDE + 2 * MARGIN, 3), dtype=np.float32)
    padded[:] = ground
    padded[MARGIN:-MARGIN, MARGIN:-MARGIN] = pixels
    smooth = _smoothed(padded)
    contrasts = np.sqrt(((smooth - ground) ** 2).sum(axis=2))
    is_garment = contrasts > LARGEST_BACKGROUND_DISTANCE
    if is_garment.mean() < 0.1:
        return None
    # Half the garment's own contrast is where its edge was before any blur.
    is_garment = contrasts > max(LARGEST_BACKGROUND_DISTANCE, 0.4 * float(np.median(contrasts[is_garment])))
    is_garment = _neighbours(is_garment) >= 5
    # Prints and linings may come near the ground: what has garment on all four sides is garment.
    left, right = (np.logical_or.accumulate(is_garment[:, ::step], axis=1)[:, ::step] for step in (1, -1))
    above, below = (np.logical_or.accumulate(is_garment[::step], axis=0)[::step] for step in (1, -1))
    is_garment = left & right & above & below
    if is_garment.mean() < 0.1:
        return None
    is_ground = (contrasts <= LARGEST_BACKGROUND_DISTANCE) & ~is_garment
    return _Garment(mask=is_garment, is_ground=is_ground, pixels=smooth)


def _smoothed(pixels: np.ndarray) -> np.ndarray:
    """The mean of the 3x3 pixels around each, against noise and compression."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """How many of the 3x3 pixels around each are set; beyond the border the nearest pixel counts."""
    padded = np.pad(mask.astype(np.int8), 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _read_colour(inner: np.ndarray) -> str | None:
    """The colour that the garment's pixels (P, 3) are cloth of; None without a clear majority, or too many strays.

    A pixel belongs to a colour when it lies near the line from that cloth to black (shade, outlines) or to the ink of
    its print (blurred prints), and counts the more the nearer it is to the cloth's end.
    """
    if len(inner) == 0:
        return None
    starts, directions, lengths = _colour_lines()
    # Products of matrices instead of (P, lines, 3) differences: this is the costliest step after the comparison.
    dots = inner @ directions.T - (starts * directions).sum(axis=1)  # (P, lines)
    squares = (inner**2).sum(axis=1)[:, None] - 2 * inner @ starts.T + (starts**2).sum(axis=1)
    along = np.clip(dots / lengths, 0, 1)  # (P, lines): 0 at the cloth's end
    squares += along * (along * lengths - 2 * dots)
    is_near = squares <= LARGEST_COLOUR_DISTANCE**2
    weights = np.where(is_near, 1 - along, 0).reshape(len(inner), -1, 2).max(axis=2)  # (P, colours)
    shares = weights.mean(axis=0)
    second, best = np.argsort(shares)[-2:]
    if shares[best] < LEAST_COLOUR_SHARE or shares[best] - shares[second] < LEAST_COLOUR_LEAD:
        return None
    explained = float(is_near.reshape(len(inner), -1, 2)[:, best].any(axis=1).mean())
    return list(COLOURS)[best] if explained >= LEAST_EXPLAINED_SHARE else None


@functools.cache
def _colour_lines() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From each cloth to black and to its ink: starts and directions float32 (lines, 3), squared lengths (lines)."""
    starts = np.asarray([cloth for cloth, _ in COLOURS.values() for _ in range(2)], dtype=np.float32)
    ends = np.asarray([end for _, ink in COLOURS.values() for end in ((0, 0, 0), ink)], dtype=np.float32)
    directions = ends - starts
    return starts, directions, (directions**2).sum(axis=1)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a mask that is not empty; right and bottom are exclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _stretched(garment: _Garment, extent: tuple[int, int, int, int]) -> np.ndarray:
    """What is inside `extent`, stretched to a square: float32 (GRID² * 3), in levels above the background."""
    levels = np.rint(garment.pixels).astype(np.uint8)
    levels[garment.is_ground] = BACKGROUND
    view = Image.fromarray(levels).resize((GRID, GRID), Image.Resampling.BILINEAR, box=extent)
    return (np.asarray(view, dtype=np.float32) - np.asarray(BACKGROUND, dtype=np.float32)).reshape(-1)


def _read_shape(garment: _Garment, colour: str) -> tuple[str | None, str | None]:
    """Category and sleeve of the nearest drawing; None where it is not near enough, or another as near."""
    left, top, right, bottom = extent = _extent(garment.mask)
    width, height = right - left, bottom - top
    if min(width, height) < LEAST_EXTENT * SIDE:
        return None, None
    drawings = _drawings(colour)
    view = _stretched(garment, extent)
    squares = drawings.squares - 2 * (drawings.views @ view) + view @ view  # (K)
    least = view.size * LEAST_CONTRAST**2
    errors = np.sqrt(np.maximum(squares, 0) / np.maximum(drawings.squares, least))
    if min(width, height) < SIDE - 3:
        aspect_errors = np.abs(drawings.log_aspects - np.log(width / height))
        errors = np.where(aspect_errors <= LARGEST_ASPECT_ERROR, errors, np.inf)
    best = int(errors.argmin())
    is_same_category = drawings.categories == drawings.categories[best]
    is_same_sleeve = drawings.sleeves == drawings.sleeves[best]
    if errors[best] > LARGEST_ERROR or not _leads(errors, best, ~is_same_category, LEAST_CATEGORY_LEAD):
        return None, None
    is_sleeve_clear = _leads(errors, best, is_same_category & ~is_same_sleeve, LEAST_SLEEVE_LEAD)
    return str(drawings.categories[best]), (str(drawings.sleeves[best]) or None) if is_sleeve_clear else None


def _leads(errors: np.ndarray, best: int, is_rival: np.ndarray, lead: float) -> bool:
    return bool(errors[best] <= (1 - lead) * errors[is_rival].min(initial=np.inf))


@functools.cache
def _drawings(colour: str) -> _Drawings:
    """Draws everything that the demo set draws in one colour; takes about a second, once."""
    views, aspects, categories, sleeves = [], [], [], []
    for drawn in CATEGORIES:
        for third in drawn.third:
            for _, attributes in all_choices(drawn, colour, third):
                drawing = draw_garment(attributes, generator=None, image_size=SIDE)
                garment = _find_garment(_pixels(drawing.image))
                assert garment is not None, attributes
                left, top, right, bottom = extent = _extent(garment.mask)
                views.append(_stretched(garment, extent))
                aspects.append(np.log((right - left) / (bottom - top)))
                categories.append(drawn.category)
                sleeves.append(third if drawn.sleeves else "")
    stacked = np.stack(views)  # (K, GRID² * 3)
    return _Drawings(
        views=stacked,
        squares=(stacked**2).sum(axis=1),
        log_aspects=np.asarray(aspects),
        categories=np.asarray(categories),
        sleeves=np.asarray(sleeves),
    )
