"""Uploaded pictures: judged before they are decoded, decoded off the event loop, brought to what the model takes.

A PNG of 21 KB can hold 13,300 x 13,300 pixels, of which Pillow only warns and which cost about 860 MB as RGB. Here the
size is read from the header first; more than `limits.max_pixels` is refused. Two pictures at most are decoded at a time.

Masks come in two kinds. OpenAI's has transparent pixels, and those are regenerated; ours has none, and its white is regenerated
(engine/pipeline/init_image.py). A picture that has transparent pixels itself and comes without a mask is its own mask, as
with OpenAI.

S pixels of the model's picture, g x g grid of tokens.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engine.data.crops import DECODE_ERRORS
from engine.errors import InputError
from engine.pipeline.init_image import InitImage, check_kept_after
from serve.api.errors import Failure, input_failure
from serve.api.forms import shown
from serve.api.schemas import EditRequest
from serve.messages import ModelInfo
from serve.settings import Limits

FORMATS = ("PNG", "WEBP", "JPEG")
_DECODED_AT_ONCE = 2  # 16 million pixels are about 200 MB while a mask is worked out

# What engine/pipeline/init_image.py says of a mask, by the value that it names.
_MASKS_KO = {
    "all black": "다시 그릴 부분(투명하거나 흰 픽셀)이 가운데 정사각형 안에 없습니다",
    "all white": "그림 전체가 표시되어 남는 부분이 없습니다. 일부만 표시해 주세요",
    "white": "모든 칸에 표시가 닿아 남는 부분이 없습니다. 더 좁게 표시해 주세요",
}


class UploadReader:
    """Threads that decode; use it as a context manager, or they start with the first picture and are never joined."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(_DECODED_AT_ONCE, thread_name_prefix="uploads")

    def __enter__(self) -> "UploadReader":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def read(self, files: Mapping[str, IO[bytes]], asked: EditRequest, info: ModelInfo) -> InitImage:
        """The image that an edit starts from, at the model's size.

        Raises:
            Failure: parts that are missing or unknown, pictures that cannot be read or are too large, a mask that does
                not fit.
        """
        image_file, mask_file = _parts(files)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, read_init_image, image_file, mask_file, asked, info, self._limits.max_pixels
        )


def read_init_image(
    image_file: IO[bytes], mask_file: IO[bytes] | None, asked: EditRequest, info: ModelInfo, max_pixels: int
) -> InitImage:
    """Decodes and fits; raises Failure as `UploadReader.read`."""
    image = open_upload(image_file, "image", max_pixels=max_pixels)
    mask, mask_param = _mask(image, mask_file, asked, max_pixels)
    paste = True if asked.paste is None else asked.paste
    _check_rows(asked.keep_rows, info.grid_size)
    try:
        init_image = InitImage(image, keep_rows=asked.keep_rows, mask_image=mask, paste=paste)
        if asked.rank_by == "log_likelihood":
            check_kept_after(init_image.regenerated_tokens(info.image_size, info.grid_size))
        return init_image.resized(info.image_size, info.grid_size)
    except InputError as error:
        if error.field == "rank_by":
            told = "`rank_by`: `log_likelihood` needs something kept right of the hole or below it: rank by koclip."
            told_ko = (
                "`rank_by`: 다시 그릴 부분의 오른쪽이나 아래에 남는 부분이 있어야 `log_likelihood`를 쓸 수 있습니다."
            )
            raise Failure("invalid_value", told, told_ko, param="rank_by") from error
        if error.field != "mask_image":
            raise input_failure(error) from error
        raise input_failure(error, param=mask_param, told_ko=_MASKS_KO.get(str(error.value), "")) from error


def open_upload(file: IO[bytes], param: str, *, max_pixels: int) -> Image.Image:
    """A picture, upright, decoded completely; its metadata goes no further than here.

    Raises:
        Failure: not PNG, WebP or JPEG; animated; more pixels than allowed, by its header; truncated or damaged.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_many_pixels(param, max_pixels)
            if getattr(image, "is_animated", False):
                raise _bad_image(param, "is animated: send a single picture", "움직이는 그림은 쓸 수 없습니다")
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise _bad_image(param, "is not a PNG, WebP or JPEG picture", "PNG, WebP, JPEG 그림이 아닙니다") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(param, max_pixels) from None
    except DECODE_ERRORS:
        raise _bad_image(param, "is truncated or damaged", "그림 파일이 손상되었습니다") from None


def _parts(files: Mapping[str, IO[bytes]]) -> tuple[IO[bytes], IO[bytes] | None]:
    for name in files:
        if name not in ("image", "image[]", "mask", "markup"):
            name = shown(name)
            raise Failure("unknown_parameter", f"No file is called `{name}`.", f"`{name}`", param=name)
    if "markup" in files:
        raise Failure("unsupported_parameter", "Leave out `markup`.", "`markup` 항목을 빼 주세요.", param="markup")
    images = [files[name] for name in ("image", "image[]") if name in files]
    if not images:
        raise Failure(
            "missing_required_parameter", "Add the file `image`.", "`image` 파일을 넣어 주세요.", param="image"
        )
    if len(images) > 1:
        raise _bad_image("image", "is there twice: one picture is drawn from", "그림은 한 장만 보낼 수 있습니다")
    return images[0], files.get("mask")


def _mask(
    image: Image.Image, mask_file: IO[bytes] | None, asked: EditRequest, max_pixels: int
) -> tuple[Image.Image | None, str]:
    """White where to redraw, or None; and the part of the form that says so."""
    if mask_file is None:
        return (_own_mask(image) if asked.keep_rows is None else None), "image"
    if asked.keep_rows is not None:
        told = "`keep_rows` goes with no mask: give one of the two."
        raise Failure("invalid_value", told, "`keep_rows`: 마스크와 함께 쓸 수 없습니다.", param="keep_rows")
    mask = _black_and_white(open_upload(mask_file, "mask", max_pixels=max_pixels))
    if mask.size != image.size:
        told = f"is {mask.width} x {mask.height}: it must be as large as the image, {image.width} x {image.height}"
        raise _bad_image("mask", told, f"그림과 크기가 같아야 합니다({image.width} x {image.height})")
    return mask, "mask"


def _check_rows(keep_rows: int | None, grid_size: int) -> None:
    if keep_rows is not None and not 1 <= keep_rows < grid_size:
        told = f"`keep_rows` must be 1 to {grid_size - 1}: pictures have {grid_size} rows of tokens."
        told_ko = f"`keep_rows`: 1부터 {grid_size - 1}까지 쓸 수 있습니다."
        raise Failure("invalid_value", told, told_ko, param="keep_rows")


def _black_and_white(mask: Image.Image) -> Image.Image:
    """White where to redraw: transparent pixels of a mask that has some, else as it is."""
    if not mask.has_transparency_data:
        return mask
    alpha = _alpha(mask)
    if alpha.min() == 255:
        return mask.convert("RGB")
    if alpha.min() > 0:
        raise _bad_image(
            "mask",
            "has half transparent pixels but no fully transparent one, which is what is regenerated",
            "완전히 투명한 픽셀이 없습니다",
        )
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))


def _own_mask(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = _alpha(image)
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8)) if alpha.min() == 0 else None


def _alpha(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _bad_image(param: str, told: str, told_ko: str) -> Failure:
    return Failure("invalid_image", f"`{param}` {told}.", f"`{param}`: {told_ko}.", param=param)


def _too_many_pixels(param: str, max_pixels: int) -> Failure:
    told = f"`{param}`: at most {max_pixels / 1e6:g} million pixels are taken."
    return Failure(
        "image_too_large", told, f"`{param}`: 최대 {max_pixels / 1e6:g}백만 픽셀까지 쓸 수 있습니다.", param=param
    )
