"""Uploaded images: checked before decoding, decoded in threads, resized for the model.

A PNG of 21 KB can hold 13,300 x 13,300 pixels, for which Pillow only warns and which take about 860 MB as RGB. Here the
size is read from the header first, and more than `limits.max_pixels` is rejected, as are too many scans and chunks
(serve/api/decode_limits.py). At most two images are decoded at a time, until their request's deadline or the server's end.

There are two types of masks. With OpenAI's, transparent pixels are regenerated; with ours, which has no transparency, white
pixels are (engine/pipeline/init_image.py). As with OpenAI, an image with transparent pixels and without a mask is its own
mask.

S pixels of the model's images, g x g grid of tokens.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import IO, TypeVar, cast

import numpy as np
from PIL import Image

from engine.data.crops import DECODE_ERRORS, is_animated
from engine.data.ground import ground_rgb
from engine.data.orientation import orientation_of, turn_upright
from engine.data.transparency import alpha_of, to_rgba, with_alpha
from engine.errors import InputError
from engine.pipeline.init_image import InitImage, check_kept_after
from serve.api.data_urls import picture_bytes
from serve.api.decode_limits import DecodingStopped, StoppableFile, excess_of
from serve.api.errors import Failure, input_failure
from serve.api.forms import printable
from serve.api.schemas import EditRequest
from serve.messages import ModelInfo
from serve.settings import Limits

UPLOAD_FORMATS = ("PNG", "WEBP", "JPEG")
FILE_PARTS = ("image", "image[]", "mask", "markup")
Read = TypeVar("Read")
_MAX_CONCURRENT = 2  # 16 million pixels take about 200 MB while a mask is computed

# Korean messages for the mask errors of engine/pipeline/init_image.py, by their `value`.
_MASKS_KO = {
    "all black": "다시 생성할 부분(투명하거나 흰 픽셀)이 가운데 정사각형 안에 없습니다",
    "all white": "이미지 전체가 표시되어 남는 부분이 없습니다. 일부만 표시해 주세요",
    "white": "모든 칸에 표시가 닿아 남는 부분이 없습니다. 더 좁게 표시해 주세요",
}


class UploadReader:
    """A thread pool that decodes uploads; as a context manager it ends their decoding and joins its threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(_MAX_CONCURRENT, thread_name_prefix="uploads")
        self._stopping = threading.Event()

    def __enter__(self) -> "UploadReader":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopping.set()
        self._threads.shutdown(cancel_futures=True)

    async def read(
        self, files: Mapping[str, IO[bytes]], edit: EditRequest, info: ModelInfo, *, left_s: float
    ) -> InitImage:
        """The init image of an edit, at the model's size.

        Args:
            left_s: seconds that the request has left; decoding ends with them.

        Raises:
            Failure: missing or unknown parts, images that cannot be read or are too large, an unsuitable mask; no time
                left; the server stops.
        """
        ends_at = time.monotonic() + left_s
        image_file, mask_file = (file and self._stoppable(file, ends_at) for file in _parts(files))
        assert image_file is not None
        most = self._limits.max_pixels
        return await self._run(partial(read_init_image, image_file, mask_file, edit, info, most))

    async def _run(self, read: Callable[[], Read]) -> Read:
        """Runs a decoding in a thread; raises Failure where it was stopped."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, read)
        except DecodingStopped:
            raise Failure("unavailable" if self._stopping.is_set() else "deadline_exceeded") from None

    def _stoppable(self, file: IO[bytes], ends_at: float) -> IO[bytes]:
        stoppable = StoppableFile(file, ends_at=ends_at, is_stopped=self._stopping.is_set)
        return cast(IO[bytes], stoppable)  # read, seek and tell are what Pillow needs

    async def read_pictures(
        self, data_urls: Mapping[str, str], info: ModelInfo, *, left_s: float
    ) -> dict[str, Image.Image]:
        """Pictures of a JSON body by their places in it: RGB, their middle squares at the model's size.

        One after the other, so that other requests' pictures are decoded between them.

        Args:
            left_s: as of `read`.

        Raises:
            Failure: no data URL, not a picture, or too many pixels in one or in all of them together; no time left; the
                server stops.
        """
        ends_at = time.monotonic() + left_s

        def read(url: str, param: str, max_pixels: int) -> tuple[Image.Image, int]:
            file = self._stoppable(picture_bytes(url, param), ends_at)
            image = open_upload(file, param, max_pixels=max_pixels)
            return _squared(image, info), image.width * image.height

        pictures, left = {}, self._limits.max_embedded_pixels
        for param, url in data_urls.items():
            most = min(left, self._limits.max_pixels)
            pictures[param], used = await self._run(partial(read, url, param, most))
            left -= used
        return pictures


def _squared(image: Image.Image, info: ModelInfo) -> Image.Image:
    """A picture as the ranker sees generated ones: RGB at the model's size, transparency on the model's ground."""
    if info.ground is not None and image.has_transparency_data:
        layer = to_rgba(image)
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*ground_rgb(info.ground), 255)), layer)
    return Image.fromarray(InitImage(image).pixels(info.image_size))


def read_init_image(
    image_file: IO[bytes], mask_file: IO[bytes] | None, edit: EditRequest, info: ModelInfo, max_pixels: int
) -> InitImage:
    """Decodes, crops and resizes an upload; raises Failure as `UploadReader.read`."""
    image = open_upload(image_file, edit.image_param, max_pixels=max_pixels)
    mask, mask_param = _mask(image, mask_file, edit, max_pixels)
    _check_rows(edit.keep_rows, info.grid_size)
    try:
        init_image = InitImage(
            image,
            keep_rows=edit.keep_rows,
            mask_image=mask,
            paste=edit.paste,
            strength=edit.strength,
            changed_from=edit.changed_from,
        )
        if edit.rank_by == "log_likelihood":
            check_kept_after(init_image.regenerated_tokens(info.image_size, info.grid_size))
        return init_image.resized(info.image_size, info.grid_size)
    except InputError as error:
        if error.field == "rank_by":
            detail = "`rank_by`: `log_likelihood` needs a kept part right of the hole or below it: rank by koclip."
            detail_ko = (
                "`rank_by`: 다시 생성할 부분의 오른쪽이나 아래에 남는 부분이 있어야 `log_likelihood`를 쓸 수 있습니다."
            )
            raise Failure("invalid_value", detail, detail_ko, param="rank_by") from error
        if error.field != "mask_image":
            raise input_failure(error) from error
        raise input_failure(error, param=mask_param, detail_ko=_MASKS_KO.get(str(error.value), "")) from error


def open_upload(file: IO[bytes], param: str, *, max_pixels: int) -> Image.Image:
    """A completely decoded, upright image; its metadata is dropped.

    Raises:
        Failure: not PNG, WebP or JPEG; animated; more pixels than allowed, by its header; too many scans or chunks;
            truncated or damaged.
    """
    excess = excess_of(file)
    if excess:
        detail, detail_ko = f"has too many {excess}: save it anew", "구조가 지나치게 복잡합니다. 다시 저장해 주세요"
        raise _bad_image(param, detail, detail_ko)
    try:
        with Image.open(file, formats=UPLOAD_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_many_pixels(param, max_pixels)
            if is_animated(image):
                raise _bad_image(param, "is animated: send a single image", "움직이는 이미지는 쓸 수 없습니다")
            loaded = with_alpha(image)
            return turn_upright(loaded, orientation_of(image))
    except Image.UnidentifiedImageError:
        raise _bad_image(param, "is not a PNG, WebP or JPEG image", "PNG, WebP, JPEG 이미지가 아닙니다") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(param, max_pixels) from None
    except DECODE_ERRORS:
        raise _bad_image(param, "is truncated or damaged", "이미지 파일이 손상되었습니다") from None


def check_no_file_is_text(fields: Collection[str]) -> None:
    """Raises Failure for a picture that a form has as text: its part has no file name."""
    for name in FILE_PARTS:
        if name in fields:
            detail = f"Send `{name}` as a file: its part has no `filename`."
            raise Failure("invalid_type", detail, f"`{name}` 항목을 파일로 보내 주세요.", param=name)


def _parts(files: Mapping[str, IO[bytes]]) -> tuple[IO[bytes], IO[bytes] | None]:
    for name in files:
        if name not in FILE_PARTS:
            name = printable(name)
            raise Failure("unknown_parameter", f"There is no file field `{name}`.", f"`{name}`", param=name)
    files = {name: file for name, file in files.items() if not _is_empty(file)}  # browsers send a part for no file, too
    if "markup" in files:
        raise Failure("unsupported_parameter", "Leave out `markup`.", "`markup` 항목을 빼 주세요.", param="markup")
    images = [files[name] for name in ("image", "image[]") if name in files]
    if not images:
        raise Failure(
            "missing_required_parameter", "Add the file `image`.", "`image` 파일을 넣어 주세요.", param="image"
        )
    if len(images) > 1:
        raise _bad_image("image", "is given twice: only one image is supported", "이미지는 한 장만 보낼 수 있습니다")
    return images[0], files.get("mask")


def _is_empty(file: IO[bytes]) -> bool:
    is_empty = file.read(1) == b""
    file.seek(0)
    return is_empty


def _mask(
    image: Image.Image, mask_file: IO[bytes] | None, edit: EditRequest, max_pixels: int
) -> tuple[Image.Image | None, str]:
    """The mask, white where to regenerate, or None; and the form field that it is from."""
    others = [name for name in ("keep_rows", "strength", "changed_from") if getattr(edit, name) is not None]
    if mask_file is None:
        return (None if others else _own_mask(image)), edit.image_param
    if others:
        detail = f"`{others[0]}` cannot be combined with a mask: give one of the two."
        raise Failure("invalid_value", detail, f"`{others[0]}`: 마스크와 함께 쓸 수 없습니다.", param=others[0])
    mask = _black_and_white(open_upload(mask_file, "mask", max_pixels=max_pixels))
    if mask.size != image.size:
        detail = f"is {mask.width} x {mask.height}: it must be as large as the image, {image.width} x {image.height}"
        raise _bad_image("mask", detail, f"이미지와 크기가 같아야 합니다({image.width} x {image.height})")
    return mask, "mask"


def _check_rows(keep_rows: int | None, grid_size: int) -> None:
    if keep_rows is not None and not 1 <= keep_rows < grid_size:
        detail = f"`keep_rows` must be 1 to {grid_size - 1}: images have {grid_size} rows of tokens."
        detail_ko = f"`keep_rows`: 1부터 {grid_size - 1}까지 쓸 수 있습니다."
        raise Failure("invalid_value", detail, detail_ko, param="keep_rows")


def _black_and_white(mask: Image.Image) -> Image.Image:
    """A mask that is white where to regenerate: from its transparent pixels if it has any, else as it is."""
    alpha = alpha_of(mask)
    if alpha is None:
        return mask
    if alpha.min() == 255:
        return mask.convert("RGB")
    if alpha.min() > 0:
        raise _bad_image(
            "mask",
            "has partially transparent pixels but no fully transparent ones, which are what is regenerated",
            "완전히 투명한 픽셀이 없습니다",
        )
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))


def _own_mask(image: Image.Image) -> Image.Image | None:
    alpha = alpha_of(image)
    if alpha is None or alpha.min() > 0:
        return None
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))


def _bad_image(param: str, detail: str, detail_ko: str) -> Failure:
    return Failure("invalid_image", f"`{param}` {detail}.", f"`{param}`: {detail_ko}.", param=param)


def _too_many_pixels(param: str, max_pixels: int) -> Failure:
    detail = f"`{param}`: the limit is {max_pixels / 1e6:g} million pixels."
    return Failure(
        "image_too_large", detail, f"`{param}`: 최대 {max_pixels / 1e6:g}백만 픽셀까지 쓸 수 있습니다.", param=param
    )
