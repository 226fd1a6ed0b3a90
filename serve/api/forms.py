"""Multipart forms: text fields and a few files, parsed strictly, with at most `SPOOL_BYTES` of a file in memory.

Parsed by python-multipart as the body arrives. Starlette's form reader uses the same parser, but silently decodes text
that is not UTF-8 as Latin-1, which garbles a caption; here that is an error.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive

from serve.api.body import body_chunks, check_text, content_type
from serve.api.errors import Failure

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 64
MAX_FILES = 17  # OpenAI's API takes 16 images and a mask; that only one image is supported is reported by name later
MAX_FIELD_BYTES = 64 * 1024
SPOOL_BYTES = 256 * 1024  # the rest of a file is spooled to disk


@dataclass
class Form:
    """A form's text fields and files, by name. `close` deletes the files on disk."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, IO[bytes]] = field(default_factory=dict)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


@contextmanager
def closing_form(form: Form) -> Iterator[Form]:
    try:
        yield form
    finally:
        form.close()


async def read_form(receive: Receive, headers: Headers, *, max_bytes: int, timeout_s: float) -> Form:
    """The whole form.

    Raises:
        Failure: not a form, a duplicate part, too many or too large parts, text that is not UTF-8; as `body_chunks`.
        ClientGone: the client closed the connection.
    """
    _, parameters = content_type(headers, "multipart/form-data")
    boundary = parameters.get("boundary", "")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise _bad_form("The Content-Type has no boundary of 1 to 70 characters.", "경계(boundary)가 없습니다.")
    reader = _FormReader(boundary)
    try:
        await reader.read(body_chunks(receive, headers, max_bytes=max_bytes, timeout_s=timeout_s))
    except BaseException:
        reader.form.close()
        raise
    return reader.form


class _FormReader:
    """The parser's callbacks and their state: the current part, and the form so far."""

    def __init__(self, boundary: str) -> None:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._read_header_name,
            "on_header_value": self._read_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._read_part,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self.form = Form()
        self._parser = MultipartParser(boundary.encode("latin-1"), callbacks)
        self._ended = False
        self._begin_part()

    async def read(self, chunks: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError:
            raise _bad_form("A part's header or boundary is malformed.", "형식이 잘못된 부분이 있습니다.") from None
        if not self._ended:
            raise _bad_form("It ends before its last boundary.", "끝 경계가 없습니다.")

    def _begin_part(self) -> None:
        self._header_name, self._header_value, self._disposition = b"", b"", b""
        self._name, self._text, self._file = "", bytearray(), None

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _open_part(self) -> None:
        disposition, options = parse_options_header(self._disposition)
        if disposition != b"form-data" or b"name" not in options:
            raise _bad_form("A part has no `Content-Disposition: form-data; name=…`.", "이름이 없는 부분이 있습니다.")
        self._name = _decoded(options[b"name"])
        if self._name in self.form.fields or self._name in self.form.files:
            detail = f"`{printable(self._name)}` appears more than once."
            raise Failure("invalid_value", detail, f"`{printable(self._name)}`", param=printable(self._name))
        if b"filename" in options:
            if len(self.form.files) >= MAX_FILES:
                raise _bad_form(f"It has more than {MAX_FILES} files.", f"파일은 {MAX_FILES}개까지입니다.")
            self._file = self.form.files[self._name] = SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115
        elif len(self.form.fields) >= MAX_FIELDS:
            raise _bad_form(f"It has more than {MAX_FIELDS} fields.", f"항목은 {MAX_FIELDS}개까지입니다.")

    def _read_part(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise Failure(
                "invalid_value",
                f"`{printable(self._name)}` is longer than {MAX_FIELD_BYTES} bytes.",
                f"`{printable(self._name)}` 항목이 너무 깁니다.",
                param=printable(self._name),
            )

    def _end_part(self) -> None:
        if self._file is None:
            self.form.fields[self._name] = _decoded(bytes(self._text))
        else:
            self._file.seek(0)
        self._begin_part()

    def _end(self) -> None:
        self._ended = True

    _header_name: bytes
    _header_value: bytes
    _disposition: bytes
    _name: str
    _text: bytearray
    _file: Any


def printable(name: str) -> str:
    """A field's name from a request, made printable and short for a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:64])


def _decoded(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad_form("A name or a field is not UTF-8.", "UTF-8이 아닌 항목이 있습니다.") from None
    check_text(text)
    return text


def _bad_form(detail: str, detail_ko: str) -> Failure:
    return Failure("invalid_form", detail, detail_ko)
