"""Limits on the decoding of uploads, checked on the file as it lies there: scans, segments and chunks; and an end to it.

The number of pixels does not bound the work: each scan of a progressive JPEG passes over all of them again, which 14 bytes
ask for, and Pillow reads segments and chunks one by one in Python. Of 16 million pixels 32 scans take about half a second,
10,000 chunks without content a tenth.

A decoder that runs is stopped at its next read: Pillow hands it JPEG and PNG files in blocks of 64 KiB. Lossless WebP
is decoded in one piece; its work is bounded by the pixels alone. So no process of its own is needed that could be killed.
"""

import re
import time
from collections.abc import Callable
from typing import IO

MAX_SCANS = 32  # encoders write 1 to 10
MAX_SEGMENTS = 10_000  # of a JPEG, or chunks of a PNG; encoders write a chunk for each 8 KiB

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_MARKER = re.compile(b"\xff[\xc0-\xcf\xd9-\xfe]")  # all that libjpeg does not step over: 0xff00 and restarts are data
_SCAN, _END = 0xDA, 0xD9


class DecodingStopped(Exception):
    """Its time is over, or the server stops."""


class StoppableFile:
    """A file whose next read raises `DecodingStopped` when it should not go on."""

    def __init__(self, file: IO[bytes], *, ends_at: float, is_stopped: Callable[[], bool]) -> None:
        self._file, self._ends_at, self._is_stopped = file, ends_at, is_stopped

    def read(self, size: int = -1, /) -> bytes:
        if self._is_stopped() or time.monotonic() >= self._ends_at:
            raise DecodingStopped
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def excess_of(file: IO[bytes] | StoppableFile) -> str:
    """What a JPEG or PNG file has too much of: `scans`, `segments`, `chunks`, or "". The file is left at its start."""
    content = file.read()
    file.seek(0)
    if content.startswith(_JPEG):
        return _excess_of_jpeg(content)
    if content.startswith(_PNG):
        return "chunks" if _has_many_chunks(content) else ""
    return ""


def _excess_of_jpeg(content: bytes) -> str:
    """Steps over segments as libjpeg does, by their lengths; after a scan's header to the next marker in the data."""
    place, num_scans = len(_JPEG), 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(content, place)
        if found is None:
            return ""
        marker, place = content[found.end() - 1], found.end()
        if marker == _END:
            if num_scans:  # what follows is not decoded: phones append films
                return ""
            continue
        num_scans += marker == _SCAN
        if num_scans > MAX_SCANS:
            return "scans"
        place += int.from_bytes(content[place : place + 2], "big")
    return "segments"


def _has_many_chunks(content: bytes) -> bool:
    place = len(_PNG)
    for _ in range(MAX_SEGMENTS):
        if place >= len(content) or content[place + 4 : place + 8] == b"IEND":
            return False
        place += 12 + int.from_bytes(content[place : place + 4], "big")  # length, name and checksum
    return True
