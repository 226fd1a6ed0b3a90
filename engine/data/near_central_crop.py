"""DALL-E's near-central crops of training images (Ramesh et al., arXiv 2102.12092, appendix, Listing 2), and a variant of them.

    `dalle`            S: the model's size; s: the image's shorter side
      square           s x s, its corner uniform in [3/8, 5/8) of what the longer side has more
      size             t, uniform in [S, min(s, 9/8 S)], both included
      resize           to t x t by area, rounded to whole numbers
      crop             S x S, anywhere in t x t; not mirrored, because images may contain text
      left out         images with s < S, which the paper's arithmetic cannot take, and those more than twice as long as wide

    `dalle-prototype`  the same as a reproduction for a small set had it, with its four deviations:
      1                images with s < S are stretched to S x S, instead of being left out; long ones are taken
      2                bilinear instead of area
      3                the centre of t x t instead of a crop anywhere
      4                bounds are included: the square may begin a pixel too far, even where there is no room at all, and
                       then has a border of zeros

Held-out images are cropped without chance: the square in the middle, resized to S.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from engine.config.run import CropKind
from engine.data.crops import open_image, read_header
from engine.data.pairs import Pair, Pairs
from engine.errors import InputError

_LONGEST = 2  # longer over shorter side of an image that `dalle` takes


@dataclass(frozen=True)
class NearCentralCrop:
    """Crops of images of any shape to `size` x `size`."""

    kind: CropKind
    size: int

    def fault(self, width: int, height: int) -> str | None:
        """Why an image of this size is left out; None: it is taken."""
        if self.kind == "dalle-prototype":
            return None
        shorter, longer = min(width, height), max(width, height)
        if shorter < self.size:
            return f"is {width} x {height}, and its shorter side has to have {self.size} pixels"
        if longer > _LONGEST * shorter:
            return f"is {width} x {height}, more than twice as long as wide"
        return None

    def random(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A crop of `image` (H, W, 3) uint8, as (size, size, 3) uint8."""
        is_paper, size = self.kind == "dalle", self.size
        height, width = image.shape[:2]
        side = min(height, width)
        if side < size:
            return _bilinear(image, size)

        def offset(slack: int) -> int:
            low = 3 * slack // 8
            return int(generator.integers(low, max(low + 1, 5 * slack // 8), endpoint=not is_paper))

        top, left = offset(height - side), offset(width - side)
        resized = int(generator.integers(size, min(side, round(9 / 8 * size)), endpoint=True))
        image = self._resize(_square(image, top, left, side), resized)
        if is_paper:
            top, left = generator.integers(0, resized - size, size=2, endpoint=True)
        else:
            top = left = round((resized - size) / 2)
        return np.ascontiguousarray(image[top : top + size, left : left + size])

    def central(self, image: np.ndarray) -> np.ndarray:
        """The middle of `image` (H, W, 3) uint8, as (size, size, 3) uint8: always the same."""
        height, width = image.shape[:2]
        side = min(height, width)
        if side < self.size:
            return _bilinear(image, self.size)
        return self._resize(_square(image, (height - side) // 2, (width - side) // 2, side), self.size)

    def _resize(self, image: np.ndarray, size: int) -> np.ndarray:
        if self.kind == "dalle-prototype":
            return _bilinear(image, size)
        return np.rint(np.clip(area_resize(image, size), 0, 255)).astype(np.uint8)


def near_central_crop(kind: CropKind | None, size: int) -> NearCentralCrop | None:
    """What a run's `data.crop` names; None: images are stretched."""
    return None if kind is None else NearCentralCrop(kind, size)


def load_photo(pair: Pair) -> np.ndarray:
    """A pair's image as it is stored, upright, (H, W, 3) uint8. Raises ImageFault (an InputError)."""
    return np.array(open_image(pair.image_path), dtype=np.uint8)


def without_uncropped(pairs: Pairs, crop: NearCentralCrop | None, *, note: Callable[[str], object]) -> Pairs:
    """The pairs without those that cannot be cropped, by the sizes that their files state.

    Args:
        note: takes one line, where some are left out.

    Raises:
        InputError: none is left to train on.
    """
    if crop is None:
        return pairs
    faults = {pair.key: fault for pair in pairs.all if (fault := _fault(pair, crop)) is not None}
    if not faults:
        return pairs
    first = f"{min(faults)} {faults[min(faults)]}"
    kept = replace(pairs, all=tuple(pair for pair in pairs.all if pair.key not in faults))
    if not kept.train:
        raise InputError(
            "data.crop", crop.kind, f"leaves no image to train on: {first}; lower the model's size, or null"
        )
    note(f"note: data.crop {crop.kind} leaves out {len(faults)} of {len(pairs)} images, the first: {first}")
    return kept


def area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """(s, s, 3) -> (size, size, 3) float64: TensorFlow's AREA method with aligned corners, as the paper calls it.

    A pixel is the mean of a window of (s - 1) / (size - 1) pixels from its corner on, the last one of a row beyond the image's
    edge, whose pixels are repeated.
    """
    return _area(_area(image.astype(np.float64), size).swapaxes(0, 1), size).swapaxes(0, 1)


def _area(image: np.ndarray, size: int) -> np.ndarray:
    """The first axis of (n, …) to `size` windows: differences of the integral over the axis."""
    n = len(image)
    scale = (n - 1) / (size - 1) if size > 1 else n / size
    edges = np.arange(size + 1, dtype=np.float64) * scale
    whole = np.minimum(edges.astype(np.int64), n - 1)
    before = np.concatenate([np.zeros_like(image[:1]), np.cumsum(image[:-1], axis=0)])
    integral = before[whole] + (edges - whole).reshape(-1, *[1] * (image.ndim - 1)) * image[whole]
    return np.diff(integral, axis=0) / scale


def _square(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """A square; where it goes beyond the image it is zero."""
    square = image[top : top + side, left : left + side]
    below, right = side - square.shape[0], side - square.shape[1]
    return np.pad(square, ((0, below), (0, right), (0, 0))) if below or right else square


def _bilinear(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _fault(pair: Pair, crop: NearCentralCrop) -> str | None:
    header = read_header(pair.image_path)
    return None if header is None else crop.fault(header.width, header.height)
