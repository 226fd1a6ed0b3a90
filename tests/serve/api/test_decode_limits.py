import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from serve.api import decode_limits, uploads
from serve.api.application import build_api
from serve.api.decode_limits import MAX_SCANS, MAX_SEGMENTS, DecodingStopped, StoppableFile, excess_of
from serve.api.errors import Failure
from serve.api.keys import add_key
from serve.api.uploads import open_upload
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, exchange, request_bytes, serving


def encoded(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(file, form, **options)
    return file.getvalue()


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of 10, is repeated."""
    content = encoded("JPEG", progressive=True, optimize=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * (count - 10) + b"\xff\xd9"


def with_chunks(count: int) -> bytes:
    content = encoded("PNG")
    place = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", 0) + b"noTe" + struct.pack(">I", zlib.crc32(b"noTe"))
    return content[:place] + chunk * count + content[place:]


def with_comments(count: int) -> bytes:
    content = encoded("JPEG")
    return content[:2] + b"\xff\xfe\x00\x02" * count + content[2:]


@pytest.mark.parametrize(
    ("content", "excess"),
    [
        (encoded("JPEG"), ""),
        (encoded("JPEG", progressive=True), ""),
        (encoded("JPEG", comment=b"\xff\xda" * 1000), ""),  # in a segment
        (encoded("JPEG") + b"\xff\xda\x00\x02" * 1000, ""),  # after the end, where phones have films
        (with_scans(MAX_SCANS), ""),
        (with_scans(MAX_SCANS + 1), "scans"),
        (with_scans(MAX_SCANS + 1).replace(b"\xff\xda", b"\xff\xff\xff\xda"), "scans"),  # fill bytes
        (with_scans(MAX_SCANS + 1)[:-2], "scans"),  # no end
        (with_comments(MAX_SEGMENTS - 100), ""),
        (with_comments(MAX_SEGMENTS), "segments"),
        (encoded("JPEG")[:2] + b"\xff\xd9" + with_comments(MAX_SEGMENTS)[2:], "segments"),  # an end before the start
        (with_chunks(MAX_SEGMENTS - 100), ""),
        (with_chunks(MAX_SEGMENTS), "chunks"),
        (encoded("WEBP"), ""),
        (b"", ""),
        (b"\xff\xd8\xff", ""),
        (b"\x89PNG\r\n\x1a\n\0", ""),
    ],
    ids=range(17),
)
def test_scans_segments_and_chunks_are_counted(content: bytes, excess: str) -> None:
    file = io.BytesIO(content)
    assert excess_of(file) == excess
    assert file.tell() == 0


@pytest.mark.parametrize("content", [with_scans(MAX_SCANS + 1), with_comments(MAX_SEGMENTS), with_chunks(MAX_SEGMENTS)])
def test_such_files_are_refused_before_they_are_opened(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads.Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(Failure, match="has too many"):
        open_upload(io.BytesIO(content), "image", max_pixels=10**6)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_decoding_ends_at_the_next_read(form: str) -> None:
    image = io.BytesIO()
    Image.effect_noise((1000, 1000), 60).convert("RGB").save(image, form)
    reads: list[int] = []

    def is_stopped() -> bool:
        reads.append(1)
        return len(reads) > most

    most = 10**6
    open_upload(StoppableFile(image, ends_at=float("inf"), is_stopped=is_stopped), "image", max_pixels=10**6)  # type: ignore[arg-type]
    most, num_reads = len(reads) - 2, len(reads)
    image.seek(0)
    reads.clear()
    with pytest.raises(DecodingStopped):
        open_upload(StoppableFile(image, ends_at=float("inf"), is_stopped=is_stopped), "image", max_pixels=10**6)  # type: ignore[arg-type]
    assert len(reads) == num_reads - 1, "in the middle of its data"


@pytest.mark.parametrize(("deadline_s", "status", "code"), [(60.0, 429, "rate_limit_exceeded"), (1e-6, 504, "")])
def test_rate_limit_and_deadline_come_before_decoding(
    deadline_s: float, status: int, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    key = add_key(tmp_path / "keys.yaml", "shop", scopes=["generate"], per_minute=1000)
    pool = ScriptedPool()
    if status == 429:

        async def take(*_: Any) -> float:
            return 7.0

        monkeypatch.setattr(pool, "take", take)
    monkeypatch.setattr(uploads.Image, "open", lambda *_, **__: pytest.fail("opened"))
    settings = ServeSettings(page=False, keys_file=str(tmp_path / "keys.yaml"), deadline_s=deadline_s)
    body = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n'
    body += (
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + encoded("PNG") + b"\r\n--x--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=x", "authorization": f"Bearer {key}"}
    with serving(build_api(pool, settings)) as port:
        reply = exchange(port, request_bytes("POST", "/v1/images/edits", body=body, port=port, headers=headers))
    assert reply.status == status
    assert reply.error["code"] == (code or "deadline_exceeded")


def test_a_server_that_stops_ends_decoding() -> None:
    reader = uploads.UploadReader(ServeSettings().limits)
    file = reader._stoppable(io.BytesIO(b"abc"), float("inf"))
    assert file.read(1) == b"a"
    with reader:
        pass
    with pytest.raises(decode_limits.DecodingStopped):
        file.read(1)
