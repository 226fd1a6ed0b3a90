"""Names of files as people wrote them: what pairing compares and reports print.

The file system keeps bytes, and archives from Korea bring three kinds: UTF-8 in composed or, from macOS, in decomposed
Hangul (NFD); cp949 as it stands, which Python shows as lone surrogates; and cp949 that an unpacker took for cp437, which shows
as line-drawing characters. A label's folder may be of one kind and its photograph's of another. Files are opened by the name
that they have; they are compared by the one that they mean.
"""

import os
import re

from engine.text import name_form

# Two bytes of a Hangul syllable in KS X 1001, which cp949 extends: line-drawing characters where they are read as cp437.
_HANGUL = re.compile(rb"(?:[\x00-\x7f]|[\xb0-\xc8][\xa1-\xfe])+")


def readable_name(name: str) -> str:
    """A name, or a path with `/`, as it was meant: in the normal form of names, cp949 decoded; other bytes as `\\xb0`."""
    if name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        return name_form(_decoded(os.fsencode(name)))
    return name_form(_without_cp437(name))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("cp949")
    except UnicodeDecodeError:
        return content.decode("utf-8", errors="backslashreplace")


def _without_cp437(name: str) -> str:
    try:
        content = name.encode("cp437")
    except UnicodeEncodeError:
        return name
    return content.decode("cp949") if _HANGUL.fullmatch(content) else name
