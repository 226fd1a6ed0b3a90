"""Hostile archives: refused in little memory, nothing outside the target written, nothing left behind."""

import gzip
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError
from engine.interop.importing import Kind, import_checkpoint
from engine.interop.tar_folder import is_tar, unpacked

_MEGABYTE = 1 << 20


def _archive(*members: tarfile.TarInfo | tuple[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def _link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("model/link")
    info.type, info.linkname = kind, target
    return info


def _header(size: int, kind: bytes = b"0", name: str = "model/huge") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _zeros_gz(before: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(before)
        for _ in range(0, size, _MEGABYTE):
            file.write(bytes(_MEGABYTE))
    return buffer.getvalue()


def _pax(records: bytes) -> bytes:
    body = records + bytes(-len(records) % 512)
    return _header(len(records), b"x", "pax") + body + _archive(("model/a", b"1"))


_FILE = ("model/a", b"1")
_HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "path out of it": (lambda: _archive(("../evil", b"1")), "leads out"),
    "path out of it, later": (lambda: _archive(("model/../../evil", b"1")), "leads out"),
    "absolute path": (lambda: _archive(("/tmp/evil", b"1")), "leads out"),
    "path of Windows": (lambda: _archive(("model\\..\\evil", b"1")), "leads out"),
    "drive of Windows": (lambda: _archive(("C:/evil", b"1")), "leads out"),
    "name with a line end": (lambda: _archive(("model/a\nb", b"1")), "leads out"),
    "name of 5,000 letters": (lambda: _archive(("a" * 5000, b"1"), kind=tarfile.GNU_FORMAT), "leads out"),
    "forty folders deep": (lambda: _archive(("a/" * 40 + "b", b"1")), "leads out"),
    "symbolic link out": (lambda: _archive(_link(tarfile.SYMTYPE, "/etc"), ("model/link/passwd", b"1")), "is a link"),
    "hard link": (lambda: _archive(_FILE, _link(tarfile.LNKTYPE, "model/a")), "is a link"),
    "device": (lambda: _archive(_link(tarfile.CHRTYPE, "")), "is a link"),
    "pipe": (lambda: _archive(_link(tarfile.FIFOTYPE, "")), "is a link"),
    "sparse file": (lambda: _header(0, b"S"), "is a link|no complete"),
    "two of a name": (lambda: _archive(_FILE, ("model/a", b"2")), "two members of the name"),
    "two of a name, spelled otherwise": (lambda: _archive(_FILE, ("./model/a", b"2")), "two members of the name"),
    "a file as a folder": (lambda: _archive(_FILE, ("model/a/b", b"2")), "two members of the name"),
    "a folder as a file": (lambda: _archive(("model/a/b", b"2"), _FILE), "two members of the name"),
    "huge declared size": (lambda: _header(1 << 42), "more than it can hold"),
    "negative size": (lambda: _pax(b"12 size=-99\n"), "more than it can hold|no complete"),
    "size that is none": (lambda: _pax(b"12 size=abc\n"), "archive: holds no checkpoint"),
    "bomb": (lambda: _zeros_gz(_header(300 * _MEGABYTE), 300 * _MEGABYTE), "more than it can hold|200 times"),
    "bomb of a long name": (lambda: _zeros_gz(_header(300 * _MEGABYTE, b"L"), 300 * _MEGABYTE), "a header of"),
    "bomb of a pax header": (lambda: _zeros_gz(_header(300 * _MEGABYTE, b"x"), 300 * _MEGABYTE), "a header of"),
    "pax headers without end": (lambda: _header(0, b"x") * 5000 + _archive(_FILE), "no complete"),
    "members without end": (lambda: b"".join(_header(0, name=f"model/{n}") for n in range(400)), "more than 200"),
    "cut off": (lambda: _archive(("model/a", bytes(5000)))[:1500], "ends within|no complete"),
    "wrong checksum": (lambda: _archive(_FILE).replace(b"ustar", b"ustar", 1)[:148] + b"0" * 8 + _archive(_FILE)[156:], "no complete|no checkpoint"),
    "gzip that is cut off": (lambda: gzip.compress(_archive(("model/a", os.urandom(20000))))[:12000], "no complete|ends within"),
    "pickle that calls": (lambda: _archive(("model/a", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.")), "refused|is a pickle"),
    "nothing": (lambda: _archive(("model/README", b"hello")), "no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_archives_are_refused(case: str, tmp_path: Path) -> None:
    make, message = _HOSTILE[case]
    path = tmp_path / "archive"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            import_checkpoint(path, tmp_path / "target" / "model")
        assert tracemalloc.get_traced_memory()[1] < 64 * _MEGABYTE
    finally:
        tracemalloc.stop()
    assert [found.name for found in tmp_path.iterdir()] == ["archive"]


def test_what_is_wrong_inside_is_named_by_the_archive(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(_archive(("model/a.pt", b"\x80\x02cos\nsystem\n.")))
    with pytest.raises(InputError, match=r"names os\.system") as raised:
        import_checkpoint(tmp_path / "archive", tmp_path / "model")
    assert f"{tmp_path / 'archive'}/a.pt" in str(raised.value)
    assert ".partial" not in str(raised.value)


@pytest.mark.parametrize("kind", ["mindalle", "vqgan", "clip"])
def test_kind_does_not_relax_it(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(_archive(_link(tarfile.SYMTYPE, "/etc")))
    with pytest.raises(InputError, match="is a link"):
        import_checkpoint(tmp_path / "archive", tmp_path / "model", kind=kind)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_honest_archives_are_unpacked(mode: Any, tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "a").write_bytes(os.urandom(3 * _MEGABYTE + 5))
    with tarfile.open(tmp_path / "archive", mode) as archive:
        archive.add(tmp_path / "model", arcname="model")
    assert is_tar(tmp_path / "archive")
    assert not is_tar(tmp_path / "model" / "deep" / "a")
    with unpacked(tmp_path / "archive", beside=tmp_path / "x" / "y") as folder:
        assert (folder / "deep" / "a").read_bytes() == (tmp_path / "model" / "deep" / "a").read_bytes()
    assert not folder.exists()
