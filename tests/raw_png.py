"""PNG files of kinds that Pillow reads and does not write: samples of 2, 4 and 16 bits with a transparent colour."""

import io
import struct
import zlib
from collections.abc import Sequence


def raw_png(samples: Sequence[Sequence[int]], *, bits: int, channels: int = 1, key: Sequence[int] = ()) -> bytes:
    """A grey or RGB PNG.

    Args:
        samples: rows of numbers of `bits` bits, `channels` to a pixel.
        key: of the tRNS chunk; () for none.
    """
    rows = io.BytesIO()
    for row in samples:
        number = 0
        for sample in row:
            number = number << bits | sample
        num_bytes = (len(row) * bits + 7) // 8
        rows.write(b"\0" + (number << (num_bytes * 8 - len(row) * bits)).to_bytes(num_bytes, "big"))
    width, height = len(samples[0]) // channels, len(samples)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels == 3 else 0, 0, 0, 0)
    transparent = _chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    data = _chunk(b"IDAT", zlib.compress(rows.getvalue()))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + transparent + data + _chunk(b"IEND", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
