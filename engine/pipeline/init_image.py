"""A picture to start from: its first rows are completed, or what a mask marks is repainted.

    pipeline([caption], given=InitImage(photo, keep_rows=7))               # the first 7 of 16 rows of tokens stay
    pipeline([caption], given=InitImage(photo, mask_image=mask))           # white is repainted

    photo ─► square ─► image_size ─► VQGAN encoder ─► tokens, kept or regenerated ─► VQGAN decoder ─► paste ─► ranking

Any size and mode is taken: upright, transparency on white, the square in its middle, resized with LANCZOS as training
pictures are. The codec is coarse: a token stands for a cell of 16 x 16 pixels (f16), so a cell that the mask touches
at all is regenerated, and decoding changes every pixel a little, kept cells too. `paste` puts the original's pixels back,
bit for bit, wherever the mask is black (or the rows were kept), inside touched cells too.

Tokens are drawn in raster order and each sees only those before it. A hole's tokens follow what is above and left of
it; what is kept after it changes nothing in them. `rank_by="fit"` picks the candidates that it agrees with: see
engine/pipeline/likelihood.py.

Without torch, so that a server's edge can check a request before any model is loaded.
S pixels of the model's picture, g x g grid of tokens, N = g * g.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.data.crops import PixelBox, crop_and_resize, upright_rgb
from engine.errors import InputError

# 14 of 32 rows, as DALL-E's completions and DALLE-pytorch's `num_init_img_tokens` (arXiv 2102.12092, appendix).
KEPT_SHARE = 0.4375
_MARKED_FROM = 128  # grey levels of a mask from here on count as white


@dataclass(frozen=True, eq=False)
class InitImage:
    """What is known of the picture before it is drawn.

    image: any size, any mode.
    keep_rows: rows of tokens kept, from the top, 1 to g - 1; None without a mask: 7 of 16 (`KEPT_SHARE`).
    mask_image: as large as `image`; white is repainted, black kept.
    paste: give the kept pixels the original's values; False: all pixels as the codec decodes them.

    Raises:
        InputError: mask and rows together; a mask of another size, with transparency, or that marks nothing or all.
    """

    image: Image.Image
    keep_rows: int | None = None
    mask_image: Image.Image | None = None
    paste: bool = True

    def __post_init__(self) -> None:
        if self.mask_image is None:
            if self.keep_rows is not None and self.keep_rows < 1:
                raise InputError("keep_rows", self.keep_rows, "must be 1 or more; without a picture, none are kept")
            return
        if self.keep_rows is not None:
            raise InputError("keep_rows", self.keep_rows, "goes with no mask: give one of the two")
        if self.mask_image.has_transparency_data and np.asarray(self.mask_image.convert("RGBA"))[..., 3].min() < 255:
            # Some programs erase what is to be regenerated, others paint it on a clear layer: no way to tell which it was.
            raise InputError("mask_image", "has transparent pixels", "make it black and white, white where to redraw")
        size, mask_size = upright_rgb(self.image).size, upright_rgb(self.mask_image).size
        if mask_size != size:
            told = f"must be as large as the picture, {size[0]} x {size[1]}"
            raise InputError("mask_image", f"{mask_size[0]} x {mask_size[1]}", told)
        marked = _marked(self.mask_image)
        if not marked.any():
            raise InputError(
                "mask_image", "all black", "marks nothing in the middle square: paint white what to redraw"
            )
        if marked.all():
            raise InputError("mask_image", "all white", "keeps nothing of the picture: paint black what to keep")

    def pixels(self, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3): the middle square at the model's size."""
        image = upright_rgb(self.image)
        return np.array(crop_and_resize(image, _middle_square(image), image_size))

    def regenerated_pixels(self, image_size: int, grid_size: int) -> NDArray[np.bool_]:
        """(S, S): True where the picture may change, before it widens to whole cells."""
        if self.mask_image is not None:
            return _shrunk(_marked(self.mask_image), image_size)
        kept = self._kept_rows(grid_size) * image_size // grid_size
        return np.repeat(np.arange(image_size)[:, None] >= kept, image_size, axis=1)

    def regenerated_tokens(self, image_size: int, grid_size: int) -> NDArray[np.bool_]:
        """(N,): True where a token is drawn, because at least one pixel of its cell may change.

        Raises:
            InputError: `keep_rows` leaves nothing to draw; the mask touches every cell.
        """
        tokens = _shrunk(self.regenerated_pixels(image_size, grid_size), grid_size)
        if tokens.all():
            told = f"touches each of the {grid_size} x {grid_size} cells, so nothing is kept: mark less"
            raise InputError("mask_image", "white", told)
        return tokens.reshape(-1)

    def _kept_rows(self, grid_size: int) -> int:
        if self.keep_rows is None:
            return max(1, int(KEPT_SHARE * grid_size))
        if self.keep_rows >= grid_size:
            told = f"this model's pictures have {grid_size} rows of tokens: keep 1 to {grid_size - 1}"
            raise InputError("keep_rows", self.keep_rows, told)
        return self.keep_rows


def _middle_square(image: Image.Image) -> PixelBox:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return PixelBox(left, top, left + side, top + side)


def _marked(mask: Image.Image) -> NDArray[np.bool_]:
    """(side, side): the mask's white in the middle square, at its own resolution."""
    mask = upright_rgb(mask)
    return np.asarray(mask.crop(_middle_square(mask)).convert("L")) >= _MARKED_FROM


def _shrunk(marked: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """(side, side) -> (size, size), larger or smaller: True where any pixel that overlaps is True.

    Not an image filter: those round a single marked pixel of a large mask down to nothing.
    """
    edges = np.arange(size + 1) * len(marked)
    first, last = edges[:-1] // size, -(-edges[1:] // size)
    for _ in range(2):  # rows, then columns
        counts = np.pad(marked.cumsum(axis=0), ((1, 0), (0, 0)))
        marked = (counts[last] > counts[first]).T
    return marked
