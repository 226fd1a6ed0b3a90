"""Files and folders appear whole or not at all."""

import json
import os
import stat
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.files import atomic_file, atomic_folder, is_hub_name, read_json, write_json


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
