"""Writing files so that a reader never sees half of one.

Everything is written under a temporary name beside its destination and renamed: a killed process leaves either the
old content or the new, plus at most a `.partial-*` leftover; a folder's is removed by the next write of that folder.
Content is on the disk before the rename, and the rename before the writer goes on, so that a power failure leaves no
more than a kill does.

A full disk, missing rights and a failing disk are faults that people mend: `named_disk_faults` reports them in one line.
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from engine.errors import InputError

_PARTIAL = ".partial-"
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or raise the quota",
    errno.EFBIG: "raise the limit on the size of a file",
    errno.EROFS: "make the disk writable, or choose another folder",
    errno.EACCES: "give this user the right to write there, or choose another folder",
    errno.EPERM: "give this user the right to write there, or choose another folder",
    errno.ENOTDIR: "choose a place below folders, not below a file",
    errno.EEXIST: "a file is there, choose another place",
    errno.EISDIR: "give the name of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the link, which leads to itself",
    errno.EIO: "check the disk, or choose another one",
}


class DiskFault(InputError):
    """A full disk, missing rights or a failing disk. It may strike one process of several."""


@contextlib.contextmanager
def named_disk_faults(path: Path, *, kept: str = "") -> Iterator[None]:
    """Turns disk faults within the block into a `DiskFault`; other errors pass.

    Args:
        path: what is written, for errors that name no file.
        kept: what is not lost, after a semicolon of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        fault = as_disk_fault(error, path, kept=kept)
        if fault is None:
            raise
        raise fault from error


def as_disk_fault(error: OSError | SafetensorError, path: Path | None = None, *, kept: str = "") -> DiskFault | None:
    """The fault that an error reports; None if it is of another kind, or no file is known."""
    if isinstance(error, OSError):
        number = error.errno
    else:  # safetensors writes by Rust, whose errors have the number in their text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    named = getattr(error, "filename", None) or path
    if number not in _REMEDIES or named is None:
        return None
    reason = error.strerror if isinstance(error, OSError) else os.strerror(number)
    remedy = f"{reason}: {_REMEDIES[number]}"
    return DiskFault("disk", named, f"{remedy}; {kept}" if kept else remedy)


@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 of a file's content."""

    size_bytes: int
    sha256: str


def file_digest(path: Path) -> FileDigest:
    """Digest of what the file holds now."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileDigest(size, digest.hexdigest())


class VerifiedFile:
    """A file for writing that is forced to the disk and read back when the block ends.

    `digest` is of the bytes that were handed to `write`, not of those that were found.

    Raises:
        OSError: with the file's name; EIO if other bytes are read back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self._size, self._hash.hexdigest())

    def write(self, content: bytes | bytearray | memoryview) -> int:
        self._hash.update(content)
        with self._named():
            written = self._file.write(content)
        self._size += written
        return written

    def flush(self) -> None:
        """torch.save calls it; what is held back is written at the end of the block."""

    def __enter__(self) -> "VerifiedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._error is not None:
                raise self._error  # torch.save has an error of its own by now, which names neither file nor cause
            if error is not None:
                return
            with self._named():
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):  # of bytes that could not be written before
                self._file.close()
        if file_digest(self._path) != self.digest:
            raise OSError(errno.EIO, "Other bytes are read back than were written", str(self._path))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = OSError(error.errno, error.strerror, str(self._path))
            raise self._error from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path`, or to what a link there leads to, at the end of the block.

    Raises:
        InputError: `path` is a folder or a device.
    """
    path = Path(os.path.realpath(path))
    with named_disk_faults(path):
        exists = is_there(path)
    if exists and not path.is_file():
        what = "a folder" if path.is_dir() else "no ordinary file"
        raise InputError("file", path, f"is {what}: give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".partial-{_beginning(path.name)}-", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    temporary.chmod(0o644)  # mkstemp makes 0600, which would stay on the final file
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_file_place(path: Path, *, field: str, beside: str = "") -> None:
    """Tries whether a file can be written, before the work whose result goes into it.

    Args:
        beside: suffix of a file of the same name that is written, too; "": there is none.

    Raises:
        InputError: with `field`: a folder or a device, a place where nothing can be written, a name that ends in `beside`.
    """
    if beside and path.suffix.lower() == beside:
        raise InputError(field, path, f"is not a place for a JSON file: give a file name such as {path.stem}.json")
    try:
        with _no_folder_left(path), named_disk_faults(path), contextlib.suppress(_Tried), atomic_file(path):
            raise _Tried
    except InputError as error:
        raise InputError(field, path, error.remedy) from error


@contextlib.contextmanager
def _no_folder_left(path: Path) -> Iterator[None]:
    """Removes the folders above `path` that a trial made, so that a command that is refused later leaves nothing."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()


def check_folder_place(path: Path, *, field: str, holds: str, what: str) -> None:
    """Tries whether a folder can be written or replaced, before the work whose result goes into it.

    Args:
        holds: name of a file in folders that may be replaced.
        what: what these are.

    Raises:
        InputError: with `field`: a file, a folder of something else, or a place where nothing can be written.
    """
    place = Path(os.path.realpath(path))
    held = held_names(place) if os.path.isdir(place) else set()
    if (os.path.exists(place) and not place.is_dir()) or (held and holds not in held):
        raise InputError(field, path, f"holds something other than {what}: choose another folder")
    try:
        with _no_folder_left(path), contextlib.suppress(_Tried), atomic_folder(path, replace=True):
            raise _Tried
    except InputError as error:
        raise InputError(field, path, error.remedy) from error


class _Tried(Exception):
    """Ends a block that has shown what it was to show."""


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder; renames it to `path` when the block ends without an exception.

    A folder that is there and empty (a mount point, `.`, what a link leads to) stays, and the content is moved into it.

    Args:
        path: the final folder.
        replace: an existing `path` is removed once the new one is complete; without it an existing non-empty folder
            is an InputError before any work is done.

    Raises:
        InputError: also for a full disk, missing rights and other faults of the place.
    """
    place = Path(os.path.realpath(path))
    with named_disk_faults(path):
        exists = is_there(place)
    if exists and not replace and (not place.is_dir() or held_names(place)):
        raise InputError("destination", path, "exists already: choose another folder, or remove it first")
    is_inside = exists and place.is_dir() and (os.path.ismount(place) or not held_names(place))
    home = place if is_inside else place.parent
    with named_disk_faults(path):
        home.mkdir(parents=True, exist_ok=True)
        prefix = f"{_PARTIAL}{_beginning(place.name)}-"
        for leftover in home.glob(f"{glob.escape(prefix)}*"):
            if "-" not in leftover.name[len(prefix) :]:  # else it belongs to a longer name: `model-best` beside `model`
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        temporary.chmod(0o755)
        try:
            yield temporary
            (_move_into if is_inside else replace_folder)(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder. Raises OSError: nothing can ever be there: a name that is too long, a link to itself."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    return True


def held_names(folder: Path) -> set[str]:
    """What a folder holds, but for what a file system makes by itself, and for what killed writers left."""
    return {path.name for path in folder.iterdir() if path.name != "lost+found" and not path.name.startswith(_PARTIAL)}


def replace_folder(folder: Path, path: Path) -> None:
    """Renames a complete folder to `path`, beside it; what was there is removed afterwards."""
    os.sync()  # one call: an fsync a file is a third of the time of preparing 3,000 images
    # Two renames, not remove-then-rename: at no moment is there nothing to recover from.
    old = path.with_name(f".old-{_beginning(path.name)}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
    folder.replace(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _move_into(folder: Path, place: Path) -> None:
    """Moves a folder's content up into `place`, in the order in which it was written: what says that all is there, last."""
    os.sync()
    old = folder / ".old"
    old.mkdir()
    for name in held_names(place):
        (place / name).replace(old / name)
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        if path != old:
            path.replace(place / path.name)
    sync(place)


def _beginning(name: str) -> str:
    """So much of a name that a prefix and a random end fit beside it into the 255 bytes of a file system."""
    return name if len(os.fsencode(name)) <= 200 else os.fsencode(name)[:200].decode(errors="ignore")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as UTF-8 JSON, atomically, Korean left readable; what has no encoding, such as a byte of a file name,
    stands there as JSON's own escape."""
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, *, field: str, remedy: str) -> Any:
    """Reads JSON; a missing or broken file is an InputError with `field` and `remedy`."""
    if not path.is_file():
        raise InputError(field, path, f"no such file: {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also not UTF-8, or a number of more digits than Python reads
        raise InputError(field, path, f"is not JSON ({error}): {remedy}") from error


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path, new or not, leads into a folder. A link that leads to itself leads nowhere."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync of a folder
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def is_hub_name(text: str) -> bool:
    """Whether `owner/name` can only mean the Hugging Face hub: in a folder that is here, `runs/nosuch` is a slip."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).parent.is_dir()
