"""Stored documents name no folder of the machine that made them."""

import importlib
from pathlib import Path

import pytest

from tests.paths import REPOSITORY


def test_paths_are_stored_as_others_can_read_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    stored_path = importlib.import_module("machine_facts").stored_path
    assert stored_path(REPOSITORY / "models" / "clothing") == "models/clothing"
    assert stored_path(tmp_path / "data" / "clothing128") == "clothing128"
    monkeypatch.chdir(REPOSITORY)
    assert stored_path(Path("models/clothing")) == "models/clothing"
    monkeypatch.chdir(tmp_path)
    assert stored_path(Path("data/mine")) == "mine"
