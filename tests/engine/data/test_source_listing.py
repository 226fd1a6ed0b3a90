"""A source folder is recognised, and what changed in it is named."""

from pathlib import Path

import pytest

from engine.data.source_listing import first_difference, source_listing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b with spaces"):
        (folder / f"{name}.jpg").write_bytes(b"12345")
        (folder / f"{name}.txt").write_text("A red shirt", encoding="utf-8")
    return folder


def test_the_same_files_are_the_same(source: Path) -> None:
    before = source_listing(source)
    (source / "a.jpg").touch()
    assert first_difference(before, source_listing(source)) is None


def test_what_changed_is_named(source: Path) -> None:
    before = source_listing(source)
    (source / "a.txt").write_text("A blue hat!", encoding="utf-8")  # as long as before
    assert first_difference(before, source_listing(source)) == "1 changed (the first: a.txt)"
    (source / "inner" / "b with spaces.jpg").unlink()
    (source / "c.jpg").write_bytes(b"1")
    (source / "d.jpg").write_bytes(b"1")
    assert first_difference(before, source_listing(source)) == (
        "1 changed (the first: a.txt), 1 gone (the first: inner/b with spaces.jpg), 2 new (the first: c.jpg)"
    )
