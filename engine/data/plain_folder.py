"""Plain folders: images with their captions beside them, name.jpg + name.txt.

Names are compared first as they are, then as they look (engine/text.py): macOS writes Hangul decomposed, and an editor its text
beside it composed. A key is the path under the folder in normal form, without suffix; where several would have one key, on a disk
that knows no capitals among others, each gets a digest of its own path. Nothing depends on the order of the files.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.data.names import readable_name
from engine.data.source_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, paths_under, suffix_of
from engine.errors import printable
from engine.text import TextFault, clean_name

_LINE_ENDS = frozenset("\n\r\t")  # white space in a text, but reports and listings have a file a line
_MOST_NAME_BYTES = 160  # of each part of a key: file systems end at 255, and suffixes and temporary names come to it


@dataclass(frozen=True)
class PlainPair:
    """An image and its caption file; `key` is unique in the folder, and a path that any file system takes."""

    key: str
    image: Path
    text: Path


class Unmatched(NamedTuple):
    """A file that is not used: its path under the folder as it can be printed, a one-word cause, and the reason."""

    name: str
    cause: str
    reason: str


def find_plain(folder: Path) -> tuple[list[PlainPair], list[Unmatched]]:
    """The images under a folder with their caption files, sorted by key, and every image or caption file without the other."""
    unmatched: list[Unmatched] = []
    files: dict[str, list[str]] = {"image": [], "text": [], "unread": [], "other": []}
    for path in paths_under(folder):
        kind = _kind(suffix_of(path))
        fault = None if kind == "other" else _name_fault(path)
        if fault is None:
            files[kind].append(path)
        else:
            unmatched.append(Unmatched(printable(path), "bad_name", fault))
    images, texts = (_by_stem(files[kind], unmatched) for kind in ("image", "text"))
    matched = [(images.pop(stem), texts.pop(stem)) for stem in sorted(images.keys() & texts.keys())]
    alike = {clean_name(stem): stem for stem in sorted(texts, reverse=True)}
    for stem in sorted(images):
        other = alike.pop(clean_name(stem), None)
        if other is not None:
            matched.append((images.pop(stem), texts.pop(other)))
    unmatched += _left_over(images, texts, files)
    keys = _keys([image for image, _ in matched])
    pairs = [PlainPair(keys[image], folder / image, folder / text) for image, text in matched]
    return sorted(pairs, key=lambda pair: pair.key), sorted(unmatched)


def _kind(suffix: str) -> str:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "text" if suffix == ".txt" else "unread" if suffix in UNREAD_SUFFIXES else "other"


def _name_fault(path: str) -> str | None:
    if _LINE_ENDS.intersection(path):
        return "its name has a line end or a tab: rename it"
    try:
        clean_name(path)
    except TextFault as fault:
        meant = readable_name(path)
        read = f" (in cp949 it reads {meant})" if meant != path and meant.isprintable() else ""
        return f"its name {fault.remedy.partition(': ')[0]}{read}: rename it (convmv -f cp949 -t utf-8 -r --notest)"
    return None


def _by_stem(paths: Iterable[str], unmatched: list[Unmatched]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        first = found.setdefault(_stem(path), path)
        if first != path:
            unmatched.append(Unmatched(path, "equal_stems", f"has the same name as {first.rpartition('/')[2]}"))
    return found


def _left_over(images: dict[str, str], texts: dict[str, str], files: dict[str, list[str]]) -> Iterable[Unmatched]:
    beside = {_stem(path): path for path in files["other"]}
    for path in files["unread"]:
        texts.pop(_stem(path), None)
        reason = f"is in a format that is not read ({suffix_of(path)}): convert it to JPEG or PNG"
        yield Unmatched(path, "unread_format", reason)
    for stem, path in images.items():
        yield Unmatched(path, "photo_without_caption", f"there is no {stem}.txt")
    for stem, path in texts.items():
        other = f", and {beside[stem].rpartition('/')[2]} is none that is read" if stem in beside else ""
        yield Unmatched(path, "caption_without_photo", f"no image named {stem}{other}")


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _keys(images: list[str]) -> dict[str, str]:
    """A key for each path."""
    keys = {image: "/".join(_short(part) for part in clean_name(_stem(image)).split("/")) for image in images}
    uses = Counter(key.casefold() for key in keys.values())
    return {image: f"{key}-{_digest(image)}" if uses[key.casefold()] > 1 else key for image, key in keys.items()}


def _short(part: str) -> str:
    content = part.encode()
    if len(content) <= _MOST_NAME_BYTES:
        return part
    return f"{content[: _MOST_NAME_BYTES - 9].decode(errors='ignore')}-{_digest(part)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
