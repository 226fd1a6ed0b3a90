"""The files of a source folder as one text, by which a later run knows whether they are still the same.

One line a file: size in bytes, SHA-256 of what is short (captions, labels; `-` for images, whose size must do), path.
"""

import hashlib
from pathlib import Path

from engine.data.source_files import files_under
from engine.errors import printable

_READ_WHOLE = (".txt", ".json", ".jsonl")


def source_listing(source: Path) -> str:
    """The listing, sorted by path."""
    lines = []
    for path in files_under(source):
        name = printable(path.relative_to(source).as_posix())
        if not path.exists():
            lines.append(f"0 gone {name}\n")  # a link to nothing
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.suffix.lower() in _READ_WHOLE else "-"
        lines.append(f"{path.stat().st_size} {digest} {name}\n")
    return "".join(lines)


def first_difference(before: str, now: str) -> str | None:
    """How a folder differs from an earlier listing of it, by the number of files and the first one; None: not at all."""
    if before == now:
        return None
    old, new = _by_path(before), _by_path(now)
    gone, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    changed = sorted(path for path in old.keys() & new.keys() if old[path] != new[path])
    kinds = ((changed, "changed"), (gone, "gone"), (added, "new"))
    return ", ".join(f"{len(paths)} {kind} (the first: {paths[0]})" for paths, kind in kinds if paths)


def _by_path(listing: str) -> dict[str, str]:
    rows = (line.split(" ", 2) for line in listing.splitlines())
    return {path: f"{size} {digest}" for size, digest, path in rows}
