"""Files that torch.save or torch.jit.save wrote: their tree as inert values, their tensors one by one.

    zip (since torch 1.6)   <name>/data.pkl, and each storage as an uncompressed member <name>/data/<key>
    legacy                  five pickles (magic, protocol, system, tree, storage keys), then each storage with its length

Only what is needed is read: a tensor's bytes when its turn comes, so a file of any size needs the memory of its largest
tensor. A member that is compressed, named twice, outside the archive's folder or shorter than its tensors is an error.
"""

import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.errors import InputError
from engine.interop.pickle_machine import MAX_PICKLE_BYTES, read_pickle
from engine.interop.pickle_values import Record, Storage, StoredTensor, UnsafePickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_MAX_REPEATED_BYTES = 64 << 20  # of an expanded tensor, whose few stored numbers could stand for terabytes
_MAX_ZIP_TAIL = (1 << 16) + 100  # a comment of the greatest length, and the records of the directory's place
_MAX_DIRECTORY_BYTES = 8 << 20  # of a zip: 80,000 members; each is an object of 0.5 KB


@dataclass(frozen=True)
class TorchFile:
    """A checkpoint that is open for reading by name.

    Attributes:
        tree: what the file holds, as `engine.interop.pickle_machine` reads it.
        places: storage key -> (first byte in the file, bytes).
    """

    path: Path
    tree: Any
    places: dict[str, tuple[int, int]]

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor itself, on the CPU; only its own part of the storage is read.

        Raises:
            InputError: the file is shorter than it says, or has more elements than numbers.
        """
        dtype = dtype_of(tensor.storage, self.path)
        repeats = tensor.numel > max(tensor.storage.numel, 1)
        if repeats and tensor.numel * dtype.itemsize > _MAX_REPEATED_BYTES:
            raise InputError(
                "checkpoint", self.path,
                f"a tensor of {list(tensor.shape)} repeats {tensor.storage.numel:,} stored numbers: it is too large for that"
            )  # fmt: skip
        if tensor.numel == 0:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        start, length = self._place(tensor.storage)
        first, count = tensor.offset * dtype.itemsize, span * dtype.itemsize
        if first + count > length:
            raise InputError("checkpoint", self.path, f"storage {tensor.storage.key} is cut off: copy the file again")
        data = torch.empty(count, dtype=torch.uint8, device="cpu")  # not zeroed, as a bytearray would be
        with self.path.open("rb", buffering=0) as file:
            file.seek(start + first)
            rest = memoryview(data.numpy().data)
            while rest:  # a call reads 2 GB at most
                read = file.readinto(rest)
                if not read:
                    raise InputError("checkpoint", self.path, "ends too early: copy the file again")
                rest = rest[read:]
        numbers = data.view(dtype)
        return numbers.as_strided(tensor.shape, tensor.strides).contiguous()

    def _place(self, storage: Storage) -> tuple[int, int]:
        if storage.key not in self.places:
            raise InputError("checkpoint", self.path, f"has no storage {storage.key}: copy the file again")
        return self.places[storage.key]


def dtype_of(storage: Storage, path: Path) -> torch.dtype:
    """Raises InputError: a storage of quantised or complex numbers."""
    if storage.kind not in _DTYPES:
        raise InputError("checkpoint", path, f"holds numbers of type {storage.kind}: save it as float32 first")
    return _DTYPES[storage.kind]


def is_torch_file(path: Path) -> bool:
    """Whether the first bytes are those of a file of torch.save, of either format."""
    with path.open("rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_torch_file(path: Path) -> TorchFile:
    """Reads the tree of a checkpoint, and where its tensors are.

    Raises:
        InputError: not a file of torch.save, a broken one, or one that asks for code to be run.
    """
    if sys.byteorder != "little":
        raise InputError("checkpoint", path, "has its numbers in the other byte order than this machine")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _open_zip(path, file) if is_zip else _open_legacy(path, file)
    except UnsafePickle as error:
        raise InputError("checkpoint", path, f"{error}: it is refused, nothing of it was run") from error
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError("checkpoint", path, f"is no complete file of torch.save ({error}): copy it again") from error


def _open_zip(path: Path, file: BinaryIO) -> TorchFile:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    trees = [member for member in members if member.filename.endswith("/data.pkl") and member.filename.count("/") == 1]
    if len(trees) != 1:
        raise UnsafePickle(f"has {len(trees)} trees of values in its archive")
    if len(set(names)) != len(names):
        raise UnsafePickle("has two members of one name")
    folder = trees[0].filename.removesuffix("data.pkl")
    size = path.stat().st_size
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        if not member.filename.startswith(folder) or ".." in member.filename.split("/") or "\\" in member.filename:
            raise UnsafePickle(f"has the member {member.filename[:80]!r} outside its folder")
        key = member.filename.removeprefix(folder)
        if key != "data.pkl" and not key.startswith("data/"):
            continue  # not read: TorchScript's code, which is compressed, for one
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.flag_bits & 1
            or member.file_size != member.compress_size
        ):
            raise UnsafePickle(
                f"has the compressed or encrypted member {member.filename[:80]!r}, which torch never writes"
            )
        if member.header_offset + member.file_size > size:
            raise UnsafePickle(f"declares {member.file_size:,} bytes of {member.filename[:80]!r}, more than there are")
        if key.startswith("data/"):
            places[key.removeprefix("data/")] = (member.header_offset, member.file_size)
    if trees[0].file_size > MAX_PICKLE_BYTES:
        raise UnsafePickle(f"has a tree of {trees[0].file_size:,} bytes")
    _check_byteorder(file, members, folder)
    tree, _ = read_pickle(_member(file, trees[0].header_offset, trees[0].file_size))
    return TorchFile(path, tree, {key: (_data_start(file, start), length) for key, (start, length) in places.items()})


def _check_directory(file: BinaryIO) -> None:
    """Raises UnsafePickle: a directory of members that would fill the memory before the first one is looked at."""
    start = max(0, file.seek(0, 2) - _MAX_ZIP_TAIL)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    lengths = [struct.unpack("<L", tail[end + 12 : end + 16])[0]] if 0 <= end <= len(tail) - 22 else []
    locator = tail.rfind(b"PK\x06\x07", 0, max(end, 0))
    if locator >= 0:  # a directory of 64-bit numbers
        file.seek(struct.unpack("<Q", tail[locator + 8 : locator + 16])[0] & 0x7FFFFFFFFFFFFFFF)
        record = file.read(56)
        lengths = [struct.unpack("<Q", record[40:48])[0]] if len(record) == 56 else []
    file.seek(0)
    if any(length > _MAX_DIRECTORY_BYTES for length in lengths):
        raise UnsafePickle("has more members than a checkpoint needs")


def _check_byteorder(file: BinaryIO, members: list[zipfile.ZipInfo], folder: str) -> None:
    for member in members:
        if member.filename == f"{folder}byteorder" and _member(file, member.header_offset, 8)[:6] != b"little":
            raise UnsafePickle("was written on a big-endian machine")


def _member(file: BinaryIO, header_offset: int, size: int) -> bytes:
    file.seek(_data_start(file, header_offset))
    return file.read(size)


def _data_start(file: BinaryIO, header_offset: int) -> int:
    """First byte of a member's data: its local header has a name and padding of its own lengths."""
    file.seek(header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise UnsafePickle("has a member whose header is not where the directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return header_offset + 30 + int(name_length) + int(extra_length)


def _open_legacy(path: Path, file: BinaryIO) -> TorchFile:
    magic = _next_pickle(file)
    if magic != _MAGIC or _next_pickle(file) != _PROTOCOL:
        raise UnsafePickle("is a pickle, but not one of torch.save")
    system = _next_pickle(file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnsafePickle("was written on a big-endian machine")
    tree, keys = _next_pickle(file), _next_pickle(file)
    storages = {storage.key: storage for storage in (tensor.storage for tensor in tensors_in(tree))}
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys):
        raise UnsafePickle("has no list of storages, or one twice")
    size, places = path.stat().st_size, {}
    for key in keys:
        if key not in storages:
            raise UnsafePickle(f"stores {str(key)[:40]!r}, which no tensor has")  # its type is only known by one
        (numel,) = struct.unpack("<q", file.read(8))
        length = numel * dtype_of(storages[key], path).itemsize
        if numel != storages[key].numel or file.tell() + length > size:
            raise UnsafePickle(f"declares {numel:,} numbers in storage {key}, which is not what it holds")
        places[key] = (file.tell(), length)
        file.seek(length, 1)
    return TorchFile(path, tree, places)


def _next_pickle(file: BinaryIO) -> Any:
    start = file.tell()
    value, length = read_pickle(file.read(MAX_PICKLE_BYTES + 1))
    file.seek(start + length)
    return value


def tensors_in(tree: Any) -> list[StoredTensor]:
    """All tensors of a tree, each object visited once: a pickle may hold cycles, and shared parts without end."""
    found: dict[int, StoredTensor] = {}
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StoredTensor):
            found[id(value)] = value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Record):
            waiting.extend([value.state, value.arguments, value.items, value.elements])
    return list(found.values())
