import asyncio
from typing import Any

import pytest
from starlette.datastructures import Headers

from serve.api import forms
from serve.api.errors import Failure
from serve.api.forms import Form, read_form

BOUNDARY = "b0undary"


def part(name: str, data: bytes, *, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


def read(body: bytes, *, content_type: str = f"multipart/form-data; boundary={BOUNDARY}", chunk: int = 7) -> Form:
    """The form, received in small chunks."""
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = Headers({"content-type": content_type})
    return asyncio.run(read_form(receive, headers, max_bytes=10**7, timeout_s=5))


def whole(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_fields_and_files_arrive_complete_in_chunks_of_any_size(chunk: int) -> None:
    data = bytes(range(256)) * 40 + b"\r\n--b0undar\r\n--"
    form = read(whole(part("prompt", "빨강 니트".encode()), part("image", data, filename="그림.png")), chunk=chunk)
    assert form.fields == {"prompt": "빨강 니트"}
    assert form.files["image"].read() == data
    form.close()
    assert form.files["image"].closed


def test_a_quoted_boundary_with_capitals_is_read() -> None:
    body = whole(part("n", b"2")).replace(BOUNDARY.encode(), b"Ab-1 2")
    assert read(body, content_type='multipart/form-data; boundary="Ab-1 2"').fields == {"n": "2"}


def test_an_empty_form_is_valid() -> None:
    assert read(whole()) == Form()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_form"),
        (b"no form at all", "invalid_form"),
        (part("n", b"2"), "invalid_form"),  # no end
        (whole(part("n", b"2"))[:-6], "invalid_form"),
        (whole(part("n", b"\xff")), "invalid_form"),
        (whole(part("n", b"2").replace(b'"n"', b'"\xff"')), "invalid_form"),
        (whole(part("n", b"2").replace(b'; name="n"', b"")), "invalid_form"),
        (whole(part("n", b"2").replace(b"form-data", b"attachment")), "invalid_form"),
        (whole(part("n", b"2").replace(b"Content-Disposition", b"X")), "invalid_form"),
        (whole(part("n", b"2").replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 9000 + b"\r\n\r\n")), "invalid_form"),
        (whole(part("n", b"2").replace(b"\r\n\r\n", b"\r\n" + b"X: y\r\n" * 50 + b"\r\n")), "invalid_form"),
        (whole(part("n", b"a\0b")), "invalid_value"),
        (whole(part("n", b"2"), part("n", b"3")), "invalid_value"),
        (whole(part("image", b"2", filename="a"), part("image", b"3", filename="b")), "invalid_value"),
        (whole(part("image", b"2", filename="a"), part("image", b"3")), "invalid_value"),
        (whole(part("prompt", b"a" * 70_000)), "invalid_value"),
        (whole(*(part(f"f{number}", b"") for number in range(65))), "invalid_form"),
        (whole(*(part(f"f{number}", b"", filename="a") for number in range(18))), "invalid_form"),
    ],
)  # fmt: skip
def test_a_malformed_or_excessive_form_is_rejected(body: bytes, code: str) -> None:
    with pytest.raises(Failure) as raised:
        read(body)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        (f"multipart/form-data; boundary={'b' * 71}", 400),
        (f"multipart/form-data; boundary={BOUNDARY}; charset=undefined", 415),
        (f"multipart/mixed; boundary={BOUNDARY}", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json", 415),
    ],
)
def test_a_content_type_other_than_a_form_is_rejected(content_type: str, status: int) -> None:
    with pytest.raises(Failure) as raised:
        read(whole(part("n", b"2")), content_type=content_type)
    assert raised.value.status == status


def test_files_of_a_form_that_fails_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = forms.SpooledTemporaryFile

    def make(**options: Any) -> Any:
        made.append(original(**options))
        return made[-1]

    monkeypatch.setattr(forms, "SpooledTemporaryFile", make)
    with pytest.raises(Failure):
        read(part("image", b"x" * 1000, filename="a"))
    assert len(made) == 1
    assert made[0].closed


def test_without_the_limits_the_same_parts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MAX_FIELD_BYTES", 10**6)
    monkeypatch.setattr(forms, "MAX_FIELDS", 1000)
    assert len(read(whole(part("prompt", b"a" * 70_000))).fields["prompt"]) == 70_000
    assert len(read(whole(*(part(f"f{number}", b"") for number in range(65)))).fields) == 65
