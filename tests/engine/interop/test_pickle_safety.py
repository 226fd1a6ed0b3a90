"""Hostile files are refused: nothing of them is run, nothing fills the memory."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.errors import InputError
from engine.interop.importing import import_checkpoint
from engine.interop.pickle_machine import read_pickle
from engine.interop.pickle_values import UnsafePickle
from engine.interop.torch_file import open_torch_file

_MEGABYTE = 1 << 20
_SLOW = pytest.mark.slow
_MARK_FILE = "run-by-a-pickle"  # what the hostile pickles would leave in the working folder


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


_COMMAND = _text(f"touch {_MARK_FILE}")
_CALLS = {
    "reduce": b"cos\nsystem\n" + _COMMAND + b"\x85R.",
    "reduce through stack_global": _text("os") + _text("system") + b"\x93" + _COMMAND + b"\x85R.",
    "inst": b"(" + _COMMAND + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + _COMMAND + b"o.",
    "newobj": b"csubprocess\nPopen\n" + _text("touch") + b"\x85\x81.",
    "newobj_ex": b"csubprocess\nPopen\n" + _text("touch") + b"\x85}\x92.",
    "build with a __setstate__": b"ctypes\nSimpleNamespace\n)R}b.",
    "persistent id in text": b"Pstorage\n.",
    "ext1": b"\x82\x01.",
    "ext2": b"\x83\x01\x00.",
    "ext4": b"\x84\x01\x00\x00\x00.",
    "next_buffer": b"\x97.",
    "builtins.eval": b"cbuiltins\neval\n" + _text("1") + b"\x85R.",
    "builtins.getattr": b"cbuiltins\ngetattr\n" + _text("a") + _text("b") + b"\x86R.",
    "python 2's builtins": b"c__builtin__\nexec\n" + _text("1") + b"\x85R.",
    "importlib": b"cimportlib\nimport_module\n" + _text("os") + b"\x85R.",
    "torch.hub": b"ctorch.hub\nload\n" + _text("a") + b"\x85R.",
    "torch.load": b"ctorch\nload\n" + _text("a") + b"\x85R.",
    "function of a known library": b"ctransformers.utils\ncached_file\n" + _text("a") + b"\x85R.",
    "attribute of a known class": b"\x80\x04" + _text("builtins") + _text("str.format") + b"\x93.",
    "numpy's loader": b"cnumpy\nload\n" + _text("a") + b"\x85R.",
    "call of a record": b"ctorch.nn.modules.linear\nLinear\n)R" + _COMMAND + b"\x85R.",
    "call of a plain type with code": b"cbuiltins\nobject\n" + _COMMAND + b"\x85R.",
}
_BOMBS = {
    "opcodes": b"N0" * 400_000 + b"N.",
    "length of a text": b"\x8d" + struct.pack("<Q", 1 << 40) + b"a.",
    "length of bytes": b"\x8e" + struct.pack("<Q", 1 << 40) + b"a.",
    "long integer": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"a.",
    "copies of a list": b"cbuiltins\nset\nq\x00(" + b"N" * 100_000 + b"lq\x01" + b"0h\x00h\x01\x85R" * 50_000 + b".",
    "nested tuples as a key": b"}" + b"N" + b"\x85" * 50_000 + b"Ns.",
    "mark that is missing": b"t.",
    "empty stack": b"0.",
    "memo that is missing": b"h\x05.",
    "no end": b"N" * 100,
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.mark.parametrize("case", _CALLS)
def test_no_opcode_calls_anything(case: str) -> None:
    with pytest.raises(UnsafePickle):
        read_pickle(_CALLS[case])
    assert os.listdir() == []


def test_the_standard_unpickler_would_have_run_them() -> None:
    """Negative control: the command in these pickles does what the tests look for."""
    pickle.loads(_CALLS["reduce"])
    assert os.listdir() == [_MARK_FILE]


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, marks=_SLOW) if case == "opcodes" else case for case in _BOMBS])
def test_bombs_are_refused_in_little_memory(case: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickle):
            read_pickle(_BOMBS[case])
        assert tracemalloc.get_traced_memory()[1] < 200 * _MEGABYTE
    finally:
        tracemalloc.stop()


def test_cycles_and_shared_parts_end(tmp_path: Path) -> None:
    """A list in itself, and sixty lists of two times the one before: 2**60 values for whoever follows them."""
    cycle: list[object] = []
    cycle.append(cycle)
    shared: list[object] = []
    for _ in range(60):
        shared = [shared, shared]
    path = tmp_path / "cycle.pt"
    torch.save({"hparams": {"a": cycle, "b": shared}, "weights": {"a": torch.zeros(2)}}, path)
    with pytest.raises(InputError, match="is of no known kind"):
        import_checkpoint(path, tmp_path / "model")


def _archive(members: dict[str, bytes], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _two_of_a_name() -> bytes:
    data = _archive({"a/data.pkl": b"}.", "a/data/0": b"1111", "a/data/1": b"2222"})
    return data.replace(b"a/data/1", b"a/data/0")


def _storage(numel: int, shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0) -> bytes:
    """A pickle of {"a": tensor}."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    reference = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + number(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + number(offset) + b"".join(sizes) + b"\x89}tR"
    return b"\x80\x02}" + _text("a") + call + b"s."


def _many_members() -> bytes:
    data = _archive({"a/data.pkl": b"}."})
    end = data.rindex(b"PK\x05\x06")
    directory = data.index(b"PK\x01\x02")
    entries = data[directory:end] * 200_000
    return (
        data[:directory]
        + entries
        + struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), directory, 0)
    )


_ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "path out of the folder": (lambda: _archive({"a/data.pkl": b"}.", "a/../../x": b"1"}), "outside its folder"),
    "absolute path": (lambda: _archive({"a/data.pkl": b"}.", "/etc/x": b"1"}), "outside its folder"),
    "zip bomb": (lambda: _archive({"a/data.pkl": b"N0" * (16 * _MEGABYTE)}, compressed=True), "compressed"),
    "compressed storage": (lambda: _archive({"a/data.pkl": b"}.", "a/data/0": bytes(9999)}, compressed=True), "compressed"),
    "two of a name": (_two_of_a_name, "two members of one name"),
    "two trees": (lambda: _archive({"a/data.pkl": b"}.", "b/data.pkl": b"}."}), "2 trees"),
    "members without end": (_many_members, "more members than a checkpoint needs"),
    "cut off": (lambda: _archive({"a/data.pkl": b"}."})[:-30], "no complete file"),
    "tensor larger than its storage": (
        lambda: _archive({"a/data.pkl": _storage(4, (1 << 30,), (1,)), "a/data/0": bytes(16)}), "ends outside"
    ),
    "storage that is not there": (
        lambda: _archive({"a/data.pkl": _storage(1 << 38, (1 << 30,), (1,)), "a/data/0": bytes(16)}), "is of no known kind"
    ),
    "negative offset": (
        lambda: _archive({"a/data.pkl": _storage(4, (1,), (1,), offset=-4), "a/data/0": bytes(16)}), "impossible size"
    ),
    "negative stride": (
        lambda: _archive({"a/data.pkl": _storage(4, (2,), (-1,), offset=3), "a/data/0": bytes(16)}), "impossible size"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _ARCHIVES)
def test_hostile_archives_are_refused_in_little_memory(case: str, tmp_path: Path) -> None:
    make, message = _ARCHIVES[case]
    path = tmp_path / "hostile.pt"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            import_checkpoint(path, tmp_path / "target" / "model")
        assert tracemalloc.get_traced_memory()[1] < 200 * _MEGABYTE
    finally:
        tracemalloc.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "hostile.pt"]  # nothing written beside them


def test_a_tensor_that_repeats_one_number_is_read_by_no_one(tmp_path: Path) -> None:
    """Stride 0: 4 bytes in the file, 4 TB in memory. Refused when it is read, harmless while it is not."""
    path = tmp_path / "huge.pt"
    path.write_bytes(_archive({"a/data.pkl": _storage(1, (1 << 20, 1 << 20), (0, 0)), "a/data/0": bytes(4)}))
    file = open_torch_file(path)
    with pytest.raises(InputError, match="repeats 1 stored numbers"):
        file.read(file.tree["a"])


def test_small_expanded_tensors_are_read(tmp_path: Path) -> None:
    """What `torch.zeros(1).expand(…)` saves."""
    torch.save({"weights": {"a": torch.full((1,), 2.0).expand(3, 5)}}, tmp_path / "a.pt")
    file = open_torch_file(tmp_path / "a.pt")
    assert torch.equal(file.read(file.tree["weights"]["a"]), torch.full((3, 5), 2.0))


def test_kind_does_not_relax_it(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(_archive({"a/data.pkl": _CALLS["reduce"]}))
    for kind in (None, "koclip", "openai-dvae"):
        with pytest.raises(
            InputError, match=r"names os.system, which no checkpoint needs: it is refused, nothing of it was run"
        ):
            import_checkpoint(path, tmp_path / "model", kind=kind)


@pytest.mark.parametrize("zipped", [True, False])
def test_honest_files_are_read(zipped: bool, tmp_path: Path) -> None:
    """Both formats, every number type, views, shared storages, and parts of other types beside them."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"whole": base, "row": base[2], "turned": base.T, "step": base[1:3, ::2], "empty": base[:0]}
    tensors |= {
        str(kind): torch.arange(5).to(kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)
    }
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    path = tmp_path / "honest.pt"
    torch.save(
        {"weights": tensors, "size": base.shape, "device": base.device}, path, _use_new_zipfile_serialization=zipped
    )
    file = open_torch_file(path)
    assert file.tree["size"] == (4, 6)
    for name, tensor in tensors.items():
        found = file.read(file.tree["weights"][name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
