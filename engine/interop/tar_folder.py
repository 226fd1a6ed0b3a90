"""Archives of a model folder, as minDALL-E's `1.3B.tar.gz`: unpacked into a folder of our own, or refused.

Only plain files and folders come out, under relative names that occur once; links, devices, sparse files, paths that lead out and
sizes that no archive of this length has are refused before anything of them is written. tarfile reads the archive, through a file
that gives it no more than a megabyte at a time: it would take headers of any size into memory.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from engine.errors import InputError
from engine.files import named_disk_faults

_MAX_MEMBERS = 200
_MAX_BYTES = 64 << 30  # of all files together; minDALL-E has 5 GB
_MAX_RATIO = 200  # of content to archive: weights hardly shrink, zeros shrink a thousandfold
_MAX_READ = 1 << 20
_MAX_NAME = 200
_DEEPEST = 8
_GZIP, _USTAR, _USTAR_AT = b"\x1f\x8b", b"ustar", 257


class UnsafeArchive(ValueError):
    """What an archive holds that is not unpacked."""


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, or a gzip file that begins as one."""
    with path.open("rb") as file:
        head = file.read(_USTAR_AT + len(_USTAR))
        if head[:2] == _GZIP:
            file.seek(0)
            try:
                with gzip.GzipFile(fileobj=file) as content:
                    head = content.read(_USTAR_AT + len(_USTAR))
            except (OSError, EOFError, zlib.error):
                return False
    return head[_USTAR_AT:] == _USTAR


@contextmanager
def unpacked(path: Path, *, beside: Path) -> Iterator[Path]:
    """A folder with an archive's files, for as long as the block lasts; a single folder at its top is that folder.

    Args:
        beside: what the files are for; they lie on the same disk until then.

    Raises:
        InputError: an archive that is broken or hostile, or a full disk.
    """
    place = next(parent for parent in beside.absolute().parents if parent.is_dir())
    with TemporaryDirectory(prefix=".partial-import-", dir=place) as scratch, named_disk_faults(place):
        folder = Path(scratch)
        try:
            _unpack(path, folder)
        except UnsafeArchive as error:
            raise InputError("archive", path, f"{error}: it is refused") from error
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
            raise InputError("archive", path, f"is no complete tar archive ({error}): copy it again") from error
        held = list(folder.iterdir())
        yield held[0] if len(held) == 1 and held[0].is_dir() else folder


def _unpack(path: Path, folder: Path) -> None:
    size, written = path.stat().st_size, 0
    taken: set[PurePosixPath] = set()
    with path.open("rb") as raw:
        head = raw.read(2)
        raw.seek(0)
        guarded = _Guarded(
            gzip.GzipFile(fileobj=raw) if head == _GZIP else raw, limit=_MAX_RATIO * size + (_MAX_READ << 4)
        )
        with tarfile.TarFile(fileobj=cast(Any, guarded)) as archive:  # it reads, seeks and tells
            for number, member in enumerate(archive):
                if number >= _MAX_MEMBERS:
                    raise UnsafeArchive(f"has more than {_MAX_MEMBERS} members")
                name = _checked_name(member, taken)
                if member.isdir():
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    continue
                written += member.size
                if not 0 <= member.size <= guarded.limit or written > min(_MAX_BYTES, guarded.limit):
                    raise UnsafeArchive(f"declares {member.size:,} bytes of {str(name)[:60]!r}, more than it can hold")
                _write(archive, member, folder / name)


def _checked_name(member: tarfile.TarInfo, taken: set[PurePosixPath]) -> PurePosixPath:
    """Raises UnsafeArchive: a member that is no plain file or folder of a name of its own below the archive's top."""
    shown = repr(member.name[:80])
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise UnsafeArchive(f"has {shown}, which is a link, a device or another thing than a file")
    parts = member.name.rstrip("/").removeprefix("./").split("/")
    name = PurePosixPath(*parts)
    if (
        len(member.name) > _MAX_NAME
        or len(parts) > _DEEPEST
        or "\\" in member.name
        or not member.name.isprintable()
        or any(part in ("", "..") or ":" in part for part in parts)
        or (name == PurePosixPath(".") and not member.isdir())
    ):
        raise UnsafeArchive(f"has the member {shown}, whose path leads out of it or is none")
    if member.isreg() and (name in taken or any(parent in taken for parent in name.parents)):
        raise UnsafeArchive(f"has two members of the name {shown}")
    if member.isdir() and name in taken:
        raise UnsafeArchive(f"has two members of the name {shown}")
    if member.isreg():
        taken.add(name)
    return name


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if target.exists():
        raise UnsafeArchive(f"has two members of the name {member.name[:80]!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    source, left = archive.extractfile(member), member.size
    assert source is not None
    with target.open("xb") as file:
        while left:
            block = source.read(min(left, _MAX_READ))
            if not block:
                raise UnsafeArchive(f"ends within {member.name[:80]!r}")
            file.write(block)
            left -= len(block)


class _Guarded:
    """A file that is read in small pieces, up to a limit."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, *, limit: int) -> None:
        self._file, self.limit = file, limit

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise UnsafeArchive(f"has a header of {size:,} bytes" if size >= 0 else "has a header without end")
        if self._file.tell() > self.limit:
            raise UnsafeArchive(f"holds over {_MAX_RATIO} times more than its own length")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        if not 0 <= place <= self.limit:
            raise UnsafeArchive(f"holds over {_MAX_RATIO} times more than its own length")
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()
