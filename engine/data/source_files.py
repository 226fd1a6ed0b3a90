"""The files of a source folder, by what they are: label files, images, the rest; and the folders of its own split.

Paths are texts under the source, as the file system has them: a delivery has a million, and a `Path` takes ten times the
memory.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from engine.data.names import readable_name
from engine.errors import InputError

IMAGE_SUFFIXES = (
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp")
    + (".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif")
)  # fmt: skip
# Pictures that are named, because they are not read.
UNREAD_SUFFIXES = (
    (".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga", ".ppm", ".pgm", ".eps", ".ai")
    + (".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pdf")
)  # fmt: skip
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".egg", ".alz")
CONVERT = "for cp949: iconv -f cp949 -t utf-8"
Side = Literal["train", "validation"]
SourceForm = Literal["labels", "plain"]
# Folders that are a source's own split, in lower case and without a number before them.
SIDES: dict[str, Side] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_SIDES_DEPTH = 3  # folders from the source down to which a split is looked for
_NUMBER = re.compile(r"^[0-9]{1,3}[.)_ -]+(?=\D)")


@dataclass(frozen=True)
class SourceFolder:
    """The files of a folder, sorted; `others` are neither labels nor images nor archives."""

    root: Path
    labels: tuple[str, ...]
    images: tuple[str, ...]
    others: tuple[str, ...]
    archives: tuple[str, ...]


def scan(root: Path) -> SourceFolder:
    """Lists `root` recursively."""
    labels: list[str] = []
    images: list[str] = []
    others: list[str] = []
    archives: list[str] = []
    for path in paths_under(root):
        suffix = suffix_of(path)
        if suffix == ".json":
            labels.append(path)
        elif suffix in IMAGE_SUFFIXES:
            images.append(path)
        else:
            (archives if suffix in ARCHIVE_SUFFIXES else others).append(path)
    return SourceFolder(root, tuple(labels), tuple(images), tuple(others), tuple(archives))


def find_form(source: Path) -> SourceForm:
    """`labels` when there are at least as many .json as .txt files under `source`, else `plain`.

    Raises:
        InputError: no such folder, or neither kind of file in it.
    """
    if not source.is_dir():
        raise InputError("source", source, "no such folder: give one with labels and images, or name.jpg + name.txt")
    if (source / "pairs.jsonl").is_file():
        raise InputError("source", source, "is a prepared folder already: train on it, or give the original source")
    folder = scan(source)
    texts = sum(suffix_of(path) == ".txt" for path in folder.others)
    if not folder.labels and not texts:
        if folder.archives:
            first = readable_name(folder.archives[0])
            many = f"{len(folder.archives)} archives, the first: {first}"
            raise InputError("source", source, f"has {many}, and nothing beside them: {unpack_remedy(first)}")
        raise InputError("source", source, "has neither label files (.json) nor captions (.txt): nothing to prepare")
    return "labels" if len(folder.labels) >= texts else "plain"


def files_under(root: Path) -> Iterator[Path]:
    """`paths_under`, as paths that can be opened."""
    return (root / path for path in paths_under(root))


def paths_under(root: Path) -> Iterator[str]:
    """Paths under `root` of all its files, sorted folder by folder, without hidden ones (leftovers of archivers).

    Linked folders are followed, once each, unless they lie in a folder that is read already, or that one in them. A link to
    nothing is a file that cannot be opened.
    """
    return _walk(str(root), "", [os.path.realpath(root)])


def _walk(folder: str, prefix: str, read: list[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir() and (not entry.is_symlink() or _is_new(entry.path, read)):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", read)
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
            yield prefix + entry.name


def _is_new(link: str, read: list[str]) -> bool:
    """Whether a linked folder has nothing in common with those that are read, to which it is then added."""
    target = os.path.realpath(link)
    if any(f"{target}/".startswith(f"{other}/") or f"{other}/".startswith(f"{target}/") for other in read):
        return False
    read.append(target)
    return True


def suffix_of(path: str) -> str:
    """The suffix of a path, in lower case, with its point."""
    return os.path.splitext(path)[1].lower()


def stem_of(path: str) -> str:
    """The name of a file without its suffix, as it was meant (`readable_name`)."""
    return readable_name(os.path.splitext(path.rpartition("/")[2])[0])


def without_number(part: str) -> str:
    """A folder's name as it was meant, in lower case, without a number before it: `1.Training` is `training`."""
    return _NUMBER.sub("", readable_name(part).strip().lower())


def source_sides(root: Path) -> dict[str, Side]:
    """The folders under `root` that are the source's own split: paths under it, {} unless both sides are there.

    They lie side by side, at the top or in a folder or two around them, and are called train or Training, and val, valid,
    validation or Validation, with or without a number before it.
    """
    level = [""]
    for _ in range(_SIDES_DEPTH):
        sides: dict[str, Side] = {}
        below: list[str] = []
        for parent in level:
            with os.scandir(root / parent) as entries:
                found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            own = {f"{parent}{name}": SIDES[without_number(name)] for name in found if without_number(name) in SIDES}
            if set(own.values()) == {"train", "validation"}:
                sides |= own
            below += [f"{parent}{name}/" for name in found]
        if sides:
            return sides
        level = below
    return {}


def side_of(path: str, sides: dict[str, Side]) -> Side | None:
    """The side of a file, by its path under the source; None outside of both."""
    return next((side for folder, side in sides.items() if path.startswith(f"{folder}/")), None)


def display_sides(sides: dict[str, Side]) -> str:
    """The folders of a split, for messages."""
    return ", ".join(readable_name(PurePosixPath(folder).as_posix()) for folder in sides)


def unpack_remedy(archive: str) -> str:
    """How an archive is unpacked so that its names survive."""
    name = readable_name(archive.rpartition("/")[2])
    folder = name.rpartition(".")[0]
    if suffix_of(archive) == ".zip":
        return f"unpack it: unzip -O cp949 '{name}' -d '{folder}'"
    return f"unpack it into a folder '{folder}'"
