"""Request bodies: read with limits on bytes and time, then parsed strictly.

Stock FastAPI reads a body of any size, and answers a body with NaN, 1e400 or a lone surrogate with a 500, because its
validation error repeats the value and cannot be encoded. Here such values do not pass the parser, and no message repeats
raw input.

JSON must be UTF-8 without NUL and surrogates, with finite and short numbers, without duplicate keys, and at most
`MAX_DEPTH` deep. Forms are in serve/api/forms.py.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from serve.api.errors import Failure

MAX_DEPTH = 4  # every field is a plain value; `svg`, which is refused by name, is an object
MAX_NUMBER_CHARACTERS = 40  # a seed has 20; Python's own parser takes quadratic time
_IN_A_THREAD_BYTES = 32 * 1024  # 1 MiB of brackets takes 40 ms to parse, which would block the event loop


class ClientGone(Exception):
    """The client closed the connection; no answer can be sent."""


def content_type(headers: Headers, *wanted: str) -> tuple[str, dict[str, str]]:
    """The body's media type, one of `wanted`, and its parameters with lower-case names.

    Raises:
        Failure: another type, none, several, a character set that is not UTF-8, or a compressed body.
    """
    remedy, remedy_ko = f"Send {' or '.join(wanted)}.", f"{' 또는 '.join(wanted)} 형식으로 보내 주세요."
    values = headers.getlist("content-type")
    if len(values) != 1:
        raise Failure(
            "unsupported_media_type", f"There is no Content-Type header, or more than one. {remedy}", remedy_ko
        )
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        # in another server 25 MB of gzip became 14.9 GB
        raise Failure(
            "unsupported_media_type", "Send it uncompressed, without Content-Encoding.", "압축하지 않고 보내 주세요."
        )
    media_type, _, rest = values[0].partition(";")
    media_type = media_type.strip().lower()
    if media_type not in wanted:
        raise Failure("unsupported_media_type", remedy, remedy_ko)
    parameters = {}
    for part in rest.split(";"):
        name, _, value = part.partition("=")
        parameters[name.strip().lower()] = value.strip().strip('"')
    if parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise Failure("unsupported_media_type", "The text must be UTF-8.", "문자 인코딩은 UTF-8이어야 합니다.")
    return media_type, parameters


async def body_chunks(receive: Receive, headers: Headers, *, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """The body as it arrives. The declared length is checked before a byte is read, the actual one while reading.

    Raises:
        Failure: larger than `max_bytes`, or incomplete after `timeout_s` seconds in all.
        ClientGone: the client closed the connection.
    """
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    received_bytes = 0
    ends_at = asyncio.get_running_loop().time() + timeout_s
    more = True
    while more:
        try:
            async with asyncio.timeout_at(ends_at):
                message = await receive()
        except TimeoutError:
            raise Failure(
                "request_timeout", f"The limit is {timeout_s:g} seconds.", f"{timeout_s:g}초 안에 보내 주세요."
            ) from None
        if message["type"] != "http.request":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        received_bytes += len(chunk)
        if received_bytes > max_bytes:
            raise _too_large(max_bytes)
        more = message.get("more_body", False)
        if chunk:
            yield chunk


async def read_json(receive: Receive, headers: Headers, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The body's JSON object. Raises what `content_type`, `body_chunks` and `parse_object` raise."""
    content_type(headers, "application/json")
    body = b"".join([chunk async for chunk in body_chunks(receive, headers, max_bytes=max_bytes, timeout_s=timeout_s)])
    if len(body) > _IN_A_THREAD_BYTES:
        return await asyncio.to_thread(parse_object, body)
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, under the restrictions of the module's docstring.

    Raises:
        Failure: anything else; the message names the fault without repeating the input.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"Byte {error.start} is not UTF-8.", f"{error.start}번째 바이트가 UTF-8이 아닙니다.") from None
    try:
        value = json.loads(
            text,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=_no_constant,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _bad_json(f"{error.msg}, at {where}.", f"{error.lineno}행 {error.colno}열을 확인해 주세요.") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise _bad_json("It must be an object.", "객체(object)여야 합니다.")
    _check_values(value)
    return value


def parse_number(text: str) -> int | float | None:
    """The number that a form's text is in JSON; None: JSON would not read it as one, or not as a finite one."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    try:
        value = json.loads(text, parse_int=_whole_number, parse_float=_finite_number, parse_constant=_no_constant)
    except (json.JSONDecodeError, Failure):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def check_text(text: str) -> None:
    """Raises Failure for text with NUL or with a lone surrogate, which has no encoding."""
    if "\0" in text:
        raise Failure("invalid_value", "A text contains a NUL character.", "텍스트에 NUL 문자가 있습니다.")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Failure("invalid_value", "A text contains a lone surrogate.", "텍스트에 잘못된 유니코드가 있습니다.")


def _check_values(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, str):
                check_text(entry)
            elif isinstance(entry, dict):
                inner += entry.keys()
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
        if not inner:
            return
        level = inner
    if any(isinstance(entry, dict | list) for entry in level):
        raise _too_deep()
    for entry in level:
        if isinstance(entry, str):
            check_text(entry)


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARACTERS:
        raise _bad_json("It has a number that is too long.", "숫자가 너무 깁니다.")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits) if len(digits) <= MAX_NUMBER_CHARACTERS else math.inf
    if not math.isfinite(number):
        raise _bad_json("It has a number that is too large or too long.", "숫자가 너무 크거나 너무 깁니다.")
    # JSON has one type of number: 2.0 is an integer (JSON Schema, section 4.2.3), as far as floats distinguish them.
    return int(number) if number.is_integer() and abs(number) <= 2**53 else number


def _no_constant(_: str) -> NoReturn:
    raise _bad_json("NaN and Infinity are not JSON.", "NaN과 Infinity는 사용할 수 없습니다.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _bad_json("An object has a duplicate key.", "같은 키가 두 번 있습니다.")
    return values


def _bad_json(detail: str, detail_ko: str) -> Failure:
    return Failure("invalid_json", detail, detail_ko)


def _too_deep() -> Failure:
    return _bad_json(f"It is nested more than {MAX_DEPTH} deep.", f"{MAX_DEPTH}단계보다 깊게 중첩되어 있습니다.")


def _too_large(max_bytes: int) -> Failure:
    limit = f"{max_bytes / 2**20:g} MiB" if max_bytes >= 2**20 else f"{max_bytes} bytes"
    return Failure("request_too_large", f"The limit is {limit}.", f"최대 {limit}까지 보낼 수 있습니다.")
