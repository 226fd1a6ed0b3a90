"""`size` and `background` of a request as a `Rendition`: which sizes are served, which models' images are cut out.

No torch, no ray.
"""

import re

from engine.pipeline.ground_removal import has_ground
from engine.pipeline.image_encoding import ImageFormat
from engine.pipeline.init_image import InitImage
from engine.pipeline.rendition import Rendition
from serve.api.errors import invalid_value
from serve.messages import ModelInfo
from serve.settings import Limits

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def size_bounds(info: ModelInfo, limits: Limits) -> tuple[int, int]:
    """Pixels a side of the smallest and the largest image that can be requested."""
    return info.image_size, max(info.image_size, limits.max_size)


def read_rendition(
    size: str | None,
    background: str | None,
    info: ModelInfo,
    limits: Limits,
    *,
    image_format: ImageFormat,
    num_returned: int,
) -> Rendition:
    """The rendition of a request's fields.

    Args:
        num_returned: images in the answer, which share a limit of pixels when they are enlarged.

    Raises:
        Failure: a size that is not served, transparent where the model or the format has no transparency.
    """
    side = None if size in (None, "auto") else _side(size, info, limits, num_returned)
    is_transparent = background == "transparent"
    if is_transparent and info.ground is None:
        detail = "`transparent` needs a model of cut-outs; this one's images have no plain ground"
        raise invalid_value("background", detail, "이 모델의 이미지에는 잘라 낼 단색 배경이 없습니다")
    if is_transparent and image_format == "jpeg":
        detail = "`transparent` needs png or webp as `output_format`: jpeg has no transparency"
        raise invalid_value("background", detail, "jpeg에는 투명한 배경이 없습니다. png나 webp를 쓰세요")
    return Rendition(None if side == info.image_size else side, is_transparent)


def _side(size: str, info: ModelInfo, limits: Limits, num_returned: int) -> int:
    """Pixels of a requested WIDTHxHEIGHT."""
    least, most = size_bounds(info, limits)
    found = _SIZE.fullmatch(size)
    if found is None or found[1] != found[2] or not least <= int(found[1]) <= most:
        if least == most:
            raise invalid_value(
                "size", f"must be {least}x{least}, the model's size, or auto", f"이 모델의 크기는 {least}x{least}입니다"
            )
        detail = f"must be auto, {least}x{least}, the model's size, or a larger square up to {most}x{most}"
        raise invalid_value("size", detail, f"auto나 {least}x{least}부터 {most}x{most}까지의 정사각형만 쓸 수 있습니다")
    side = int(found[1])
    if side > least and num_returned * side**2 > limits.max_images * limits.max_size**2:
        fitting = limits.max_images * limits.max_size**2 // side**2
        detail = f"of {side}x{side} allows {fitting} images a request: {num_returned} are to be returned"
        raise invalid_value("size", detail, f"{side}x{side} 크기로는 한 번에 {fitting}장까지 받을 수 있습니다")
    return side


def check_init_ground(rendition: Rendition, init_image: InitImage, info: ModelInfo) -> None:
    """Raises Failure: a transparent background for an edit whose kept border is not of the model's ground."""
    if not rendition.is_transparent:
        return
    assert info.ground is not None  # checked with the request
    kept = ~init_image.regenerated_pixels(info.image_size, info.grid_size)
    if not has_ground(init_image.pixels(info.image_size), info.ground, where=kept):
        detail = (
            f"`transparent` needs an image on a plain ground like {info.ground}: this one's border is of other colours"
        )
        raise invalid_value(
            "background", detail, f"이미지의 배경이 {info.ground} 같은 단색이어야 투명하게 만들 수 있습니다"
        )
