"""Init images: generation that starts from an image, of which the first rows or all but a mask are kept.

    pipeline([caption], init_image=InitImage(photo, keep_rows=7))           # image prefix: 7 of 16 rows of tokens kept
    pipeline([caption], init_image=InitImage(photo, mask_image=mask))       # inpainting: white is regenerated
    pipeline([caption], init_image=InitImage(photo, strength=0.4))          # the 40 % least likely tokens are regenerated
    pipeline([caption], init_image=InitImage(photo, changed_from=before))   # those that the changed words touch

    image ─► square ─► image_size ─► VQGAN encoder ─► tokens, kept or regenerated ─► VQGAN decoder ─► paste ─► ranking

Any size and mode is taken: upright, transparency on white, the square in its middle, resized with LANCZOS as training
images are. The codec is coarse: a token stands for a cell of 16 x 16 pixels (f16), so a cell that the mask touches at
all is regenerated, and decoding changes every pixel a little, in kept cells too. `paste` puts the original's pixels
back, bit for bit, wherever the mask is black (or the rows were kept), inside touched cells too.

Tokens are sampled in raster order and each sees only those before it. A hole's tokens follow what is above and left of
it, and what is kept after it changes nothing in them. `rank_by="log_likelihood"` ranks by how well the two agree: see
engine/pipeline/likelihood.py. Which tokens `strength` and `changed_from` regenerate, the model decides:
engine/pipeline/token_choice.py.

Without torch, so that an API server can check a request before any model is loaded.
S pixels of the model's image, g x g grid of tokens, N = g * g.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.data.crops import PixelBox, crop_and_resize, open_image, open_layered, upright_rgb
from engine.data.transparency import alpha_of
from engine.errors import InputError
from engine.sampling_params import INIT_IMAGE_FIELDS
from engine.text import clean_text

# 14 of 32 rows, as DALL-E's completions and DALLE-pytorch's `num_init_img_tokens` (arXiv 2102.12092, appendix).
KEPT_SHARE = 0.4375
_MARKED_FROM = 128  # grey levels of a mask from here on count as white


@dataclass(frozen=True, eq=False)
class InitImage:
    """An image to start from, and which part of it is regenerated. Can be pickled.

    image: any size, any mode.
    keep_rows: rows of tokens kept, from the top, 1 to g - 1; None without a mask: 7 of 16 (`KEPT_SHARE`).
    mask_image: as large as `image`; white is regenerated, black kept.
    paste: give the kept pixels the original's values; False: all pixels as the codec decodes them. None: False where the model
        chooses the tokens, since single cells of another hand would show.
    strength: share of tokens that are regenerated, see `engine.sampling_params.INIT_IMAGE_FIELDS`.
    changed_from: caption of the image: tokens whose likelihood falls most from it to the caption are regenerated, and with
        `strength` so many; without, those whose likelihood falls noticeably.

    Raises:
        InputError: two of mask, rows and the model's choice together; a mask of another size, with transparency, or that marks
            nothing or all; a strength out of bounds, an empty `changed_from`.
    """

    image: Image.Image
    keep_rows: int | None = None
    mask_image: Image.Image | None = None
    paste: bool | None = None
    strength: float | None = None
    changed_from: str | None = None

    @classmethod
    def from_files(
        cls,
        image: Path,
        *,
        keep_rows: int | None = None,
        mask: Path | None = None,
        paste: bool | None = None,
        strength: float | None = None,
        changed_from: str | None = None,
    ) -> "InitImage":
        """The same from image files.

        Raises:
            InputError: also a file that cannot be read.
        """
        mask_image = None
        if mask is not None:
            try:
                mask_image = open_layered(mask).image  # transparency laid on white would mark what is clear
            except InputError as error:
                raise InputError("mask_image", error.value, error.remedy) from error
        return cls(
            open_image(image),
            keep_rows=keep_rows,
            mask_image=mask_image,
            paste=paste,
            strength=strength,
            changed_from=changed_from,
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", INIT_IMAGE_FIELDS["strength"].check(self.strength))
        if self.changed_from is not None:
            object.__setattr__(self, "changed_from", clean_text(self.changed_from, field="changed_from"))
            if not self.changed_from:
                raise InputError("changed_from", "(nothing)", "give the caption that the image was made from")
        if self.chosen_by_model and (self.mask_image is not None or self.keep_rows is not None):
            name, value = ("changed_from", self.changed_from) if self.strength is None else ("strength", self.strength)
            raise InputError(name, value, "goes with neither a mask nor keep_rows: give one of them")
        if self.mask_image is None:
            if self.keep_rows is not None and self.keep_rows < 1:
                raise InputError("keep_rows", self.keep_rows, "must be 1 or more; without an init image, none are kept")
            return
        if self.keep_rows is not None:
            raise InputError("keep_rows", self.keep_rows, "goes with no mask: give one of the two")
        alpha = alpha_of(self.mask_image)
        if alpha is not None and alpha.min() < 255:
            # Some programs erase what is to be regenerated, others paint it on a clear layer: both look the same here.
            remedy = "make it black and white, white where to regenerate"
            raise InputError("mask_image", "has transparent pixels", remedy)
        size, mask_size = upright_rgb(self.image).size, upright_rgb(self.mask_image).size
        if mask_size != size:
            remedy = f"must be as large as the image, {size[0]} x {size[1]}"
            raise InputError("mask_image", f"{mask_size[0]} x {mask_size[1]}", remedy)
        marked = _marked(self.mask_image)
        if not marked.any():
            raise InputError(
                "mask_image", "all black", "marks nothing in the middle square: paint white what to regenerate"
            )
        if marked.all():
            raise InputError("mask_image", "all white", "keeps nothing of the image: paint black what to keep")

    @property
    def chosen_by_model(self) -> bool:
        """Whether the tokens to regenerate follow from their likelihood."""
        return self.strength is not None or self.changed_from is not None

    @property
    def pastes(self) -> bool:
        """Whether kept pixels get the original's values."""
        return not self.chosen_by_model if self.paste is None else self.paste

    def pixels(self, image_size: int) -> NDArray[np.uint8]:
        """(S, S, 3): the middle square at the model's size."""
        image = upright_rgb(self.image)
        return np.array(crop_and_resize(image, _middle_square(image), image_size))

    def regenerated_pixels(self, image_size: int, grid_size: int) -> NDArray[np.bool_]:
        """(S, S): True where the image may change, before it widens to whole cells. Not where the model chooses."""
        assert not self.chosen_by_model
        if self.mask_image is not None:
            return _shrunk(_marked(self.mask_image), image_size)
        kept = self._kept_rows(grid_size) * image_size // grid_size
        return np.repeat(np.arange(image_size)[:, None] >= kept, image_size, axis=1)

    def regenerated_tokens(self, image_size: int, grid_size: int) -> NDArray[np.bool_]:
        """(N,): True where a token is sampled, because at least one pixel of its cell may change.

        Raises:
            InputError: `keep_rows` leaves nothing to generate; the mask touches every cell.
        """
        tokens = _shrunk(self.regenerated_pixels(image_size, grid_size), grid_size)
        if tokens.all():
            remedy = f"touches each of the {grid_size} x {grid_size} cells, so nothing is kept: mark less"
            raise InputError("mask_image", "white", remedy)
        return tokens.reshape(-1)

    def resized(self, image_size: int, grid_size: int) -> "InitImage":
        """The same init image at the model's size: equal pixels and tokens, at most a few hundred kB to send.

        Raises:
            InputError: as `regenerated_tokens`.
        """
        image = Image.fromarray(self.pixels(image_size))
        if self.chosen_by_model:
            return InitImage(image, paste=self.paste, strength=self.strength, changed_from=self.changed_from)
        self.regenerated_tokens(image_size, grid_size)
        if self.mask_image is None:
            return InitImage(image, keep_rows=self._kept_rows(grid_size), paste=self.paste)
        mask = Image.fromarray(self.regenerated_pixels(image_size, grid_size).astype(np.uint8) * 255)
        return InitImage(image, mask_image=mask, paste=self.paste)

    def record(self, image_size: int, grid_size: int) -> dict[str, Any]:
        """What provenance states: SHA-256 of the pixels (S, S, 3) and of the mask (S, S) as bytes, and the rest."""
        mask = None
        if self.mask_image is not None:
            mask = hashlib.sha256(self.regenerated_pixels(image_size, grid_size).tobytes()).hexdigest()
        return {
            "image_sha256": hashlib.sha256(self.pixels(image_size).tobytes()).hexdigest(),
            "keep_rows": None if self.mask_image is not None or self.chosen_by_model else self._kept_rows(grid_size),
            "mask_sha256": mask,
            "paste": self.pastes,
            "strength": self.strength,
            "changed_from": self.changed_from,
        }

    def _kept_rows(self, grid_size: int) -> int:
        if self.keep_rows is None:
            return max(1, int(KEPT_SHARE * grid_size))
        if self.keep_rows >= grid_size:
            remedy = f"this model's images have {grid_size} rows of tokens: keep 1 to {grid_size - 1}"
            raise InputError("keep_rows", self.keep_rows, remedy)
        return self.keep_rows


def check_kept_after(regenerated_tokens: NDArray[np.bool_] | None) -> None:
    """Checks that there are tokens to rank by log-likelihood.

    Args:
        regenerated_tokens: (N,); None without an init image.

    Raises:
        InputError: nothing is kept after the first regenerated token.
    """
    if regenerated_tokens is None or not (regenerated_tokens.cumsum() > 0)[~regenerated_tokens].any():
        remedy = "needs a mask with something kept right of it or below: rank by koclip"
        raise InputError("rank_by", "log_likelihood", remedy)


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
