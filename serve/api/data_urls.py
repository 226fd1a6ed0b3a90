"""Pictures inside JSON bodies: `data:` URLs. Addresses of other servers are refused, never fetched.

A server that fetches what a client names reaches whatever its own network does, and answers with it (server-side request
forgery). So a picture travels inside its request, whose size is limited before a byte of it is decoded.

No torch, no ray.
"""

import binascii
import io
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve.api.errors import Failure

_PREFIX = re.compile(r"data:image/(?:png|webp|jpeg|jpg);base64,", re.IGNORECASE | re.ASCII)
_SHORTEST = "data:image/png;base64,…"


class PictureReference(BaseModel):
    """OpenAI's reference to a picture in a JSON edit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image_url: str = Field(description=f"the picture itself, {_SHORTEST}: PNG, WebP or JPEG; no other URL is fetched")
    file_id: Any = Field(None, description="this server stores no files: leave it out")


def is_data_url(text: str) -> bool:
    """Whether a text is meant as a picture rather than as words."""
    return text[:11].lower() == "data:image/"


def picture_bytes(url: str, param: str) -> io.BytesIO:
    """The file in a data URL. Call it in a thread for megabytes.

    Raises:
        Failure: another URL, another type than PNG, WebP or JPEG, or no valid base64.
    """
    found = _PREFIX.match(url)
    if found is None:
        remedy, remedy_ko = f"send the picture itself as {_SHORTEST}", f"이미지를 {_SHORTEST} 형식으로 보내 주세요"
        if is_data_url(url):
            raise _bad(param, f"must be base64 of a PNG, WebP or JPEG: {remedy}", remedy_ko)
        raise _bad(
            param,
            f"is no data URL, and this server fetches nothing: {remedy}",
            f"주소의 파일은 가져오지 않습니다. {remedy_ko}",
        )
    try:
        # ascii first: `a2b_base64` reports other letters as a ValueError of its own
        return io.BytesIO(binascii.a2b_base64(url[found.end() :].encode("ascii"), strict_mode=True))
    except (binascii.Error, UnicodeEncodeError):
        raise _bad(param, "is not valid base64", "base64가 올바르지 않습니다") from None


def _bad(param: str, detail: str, detail_ko: str) -> Failure:
    return Failure("invalid_image", f"`{param}` {detail}.", f"`{param}`: {detail_ko}.", param=param)
