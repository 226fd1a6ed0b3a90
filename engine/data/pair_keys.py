"""Keys of pairs, which name their files: a photo's id as a file name, distinct from all others."""

import hashlib
import re

_LONGEST_BASE = 160  # bytes; file names end at 255, and the object's key and a suffix follow


def base_name(photo: str) -> str:
    """A photo's id as part of a file name; characters other than letters, digits, Hangul, `.` and `-` become `-`."""
    name = re.sub(r"[^0-9A-Za-z가-힣.-]", "-", photo).lstrip(".")
    if len(name.encode()) <= _LONGEST_BASE:
        return name
    start = name.encode()[: _LONGEST_BASE - 9].decode(errors="ignore")
    return f"{start}-{_short_digest(photo)}"


def distinct_base(base: str, text: str) -> str:
    """`base` for one of several photos that share it: `text`, the label file, tells them apart."""
    return f"{base}-{_short_digest(text)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
