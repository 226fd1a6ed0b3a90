"""Files and folders appear whole or not at all."""

import contextlib
import json
import os
import resource
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError
from engine.files import (
    atomic_file,
    atomic_folder,
    check_file_place,
    check_folder_place,
    is_hub_name,
    lies_within,
    named_disk_faults,
    read_json,
    write_json,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # else the rename could cross file systems
    assert path.read_text() == "whole"
    assert _names(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_failed_atomic_file_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_atomic_folder_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert _names(path.parent) == ["model"]
    assert os.access(path, os.R_OK | os.X_OK)


def test_atomic_folder_refuses_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "precious").write_text("1")
    with pytest.raises(InputError, match="exists already"), atomic_folder(path):
        pytest.fail("no work may be done first")
    (path / "precious").unlink()
    with atomic_folder(path) as temporary:  # an empty one is as good as none
        (temporary / "a").write_text("1")
    assert _names(path) == ["a"]


@pytest.mark.parametrize("fails", [False, True])
def test_atomic_folder_replaces(tmp_path: Path, fails: bool) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("1")
    try:
        with atomic_folder(path, replace=True) as temporary:
            (temporary / "new").write_text("1")
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert _names(path) == ["old" if fails else "new"]
    assert _names(tmp_path) == ["model"]


def test_leftovers_of_killed_writers_go_but_not_those_of_a_longer_name(tmp_path: Path) -> None:
    for name in (".partial-model-abcd1234", ".partial-model-best-abcd1234", ".old-model"):
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "model"):
        pass
    assert _names(tmp_path) == [".partial-model-best-abcd1234", "model"]


def test_folder_names_with_pattern_characters(tmp_path: Path) -> None:
    (tmp_path / ".partial-run[1]-abcd1234").mkdir()
    (tmp_path / ".partial-run1-abcd1234").mkdir()
    with atomic_folder(tmp_path / "run[1]"):
        pass
    assert _names(tmp_path) == [".partial-run1-abcd1234", "run[1]"]


def test_json_round_trip_keeps_korean_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"색상": ["빨강", 1.5, None]})
    assert "빨강" in path.read_text(encoding="utf-8")
    assert read_json(path, field="f", remedy="r") == {"색상": ["빨강", 1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"색상": ["빨강", 1.5, None]}


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shards: .*a\.json: is not JSON .*remove it"):
        read_json(path, field="shards", remedy="remove it")
    with pytest.raises(InputError, match="no such file: remove it"):
        read_json(tmp_path / "b.json", field="shards", remedy="remove it")


def test_a_name_below_a_folder_that_is_here_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs/nosuch` is a slip: a request to the hub takes half a minute and is useless."""
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("runs/nosuch")
    (tmp_path / "runs").mkdir()
    assert not is_hub_name("runs/nosuch")
    assert is_hub_name("klue/roberta-large")
    for name in ("./klue/x", "/klue", "~/klue", "klue", "a/b/c"):
        assert not is_hub_name(name), name


# ------------------------------------------------------------------------------------------------------- destinations


def _write(path: Path, *, replace: bool = False) -> None:
    with atomic_folder(path, replace=replace) as folder:
        (folder / "a").write_text("new")
        (folder / "sub").mkdir()


@pytest.mark.parametrize("replace", [False, True])
def test_an_empty_folder_stays_and_gets_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """A mount point cannot be renamed, the working directory must not be, and a link leads to another disk."""
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    (disk / ".partial-disk-killed01").mkdir()
    inode = disk.stat().st_ino
    (tmp_path / "link").symlink_to(disk)
    _write(tmp_path / "link", replace=replace)
    assert ((tmp_path / "link").is_symlink(), disk.stat().st_ino) == (True, inode)
    assert _names(disk) == ["a", "lost+found", "sub"]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    _write(Path("."), replace=replace)
    assert _names(here) == ["a", "sub"]
    (tmp_path / "to").symlink_to(tmp_path / "far" / "away")
    _write(tmp_path / "to")
    assert _names(tmp_path / "far" / "away") == ["a", "sub"]
    assert _names(tmp_path) == ["disk", "far", "here", "link", "to"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_content_of_a_mount_point_is_replaced_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "old").write_text("1")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == disk)
    with contextlib.suppress(ZeroDivisionError), atomic_folder(disk, replace=True) as folder:
        assert folder.parent == disk  # else it could not be moved in
        (folder / "new").write_text(str(1 / (not fails)))
    assert _names(disk) == ["old" if fails else "new"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
def test_a_real_mount_point_of_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(InputError, match="No space left on device: make room"), atomic_folder(disk) as folder:
            (folder / "a").write_bytes(bytes(200_000))
        assert _names(disk) == []
        _write(disk)
        _write(disk, replace=True)
        assert _names(disk) == ["a", "sub"]
        with pytest.raises(InputError, match="exists already"):
            _write(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    """As on a full disk, which needs no root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with (
            pytest.raises(InputError, match=r"out.*File too large: raise the limit"),
            atomic_folder(tmp_path / "out") as folder,
        ):
            (folder / "a").write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("write", [atomic_folder, atomic_file])
def test_places_where_nothing_can_be_are_one_line(tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("file/below", "loop/below", "x" * 300):
        with pytest.raises(InputError), named_disk_faults(tmp_path), write(tmp_path / place):
            pytest.fail("no work may be done first")
    assert (tmp_path / "file").read_text() == "1"
    assert _names(tmp_path) == ["file", "loop"]


def test_a_file_is_tried_before_the_work(tmp_path: Path) -> None:
    check_file_place(tmp_path / "new" / "below" / "a.json", field="--json")
    check_folder_place(tmp_path / "new" / "model", field="--out", holds="config.json", what="a model")
    assert list(tmp_path.iterdir()) == []  # what is refused later leaves nothing
    (tmp_path / "file").write_text("1")
    for place, reason in (
        (tmp_path, "a folder"),
        (tmp_path / "file" / "a", "not below a file"),
        (Path("/dev/null"), "no ord"),
    ):
        with pytest.raises(InputError, match=f"--json: .*{reason}"):
            check_file_place(place, field="--json")
    with pytest.raises(InputError, match=r"file: .*is a folder: give the name of a file"):
        write_json(tmp_path, {})
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_json(tmp_path / "link", {})
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "file").read_text()) == (True, "{}\n")


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    check_folder_place(place, field="--out", holds="config.json", what="a model")
    (place / "thesis.txt").write_text("1")
    with pytest.raises(InputError, match=r"--out: .*something other than a model"):
        check_folder_place(place, field="--out", holds="config.json", what="a model")
    (place / "config.json").write_text("{}")
    check_folder_place(place, field="--out", holds="config.json", what="a model")
    assert _names(place) == ["config.json", "thesis.txt"]
    with pytest.raises(InputError, match="something other"):
        check_folder_place(place / "thesis.txt", field="--out", holds="config.json", what="a model")


def test_what_lies_within_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert lies_within(tmp_path / "link" / "new", tmp_path / "in")
    assert not lies_within(tmp_path / "inner", tmp_path / "in")
    assert not lies_within(tmp_path / "loop" / "x", tmp_path / "in")
