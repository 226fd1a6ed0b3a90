"""docs/lineage.md: whatever it names exists, and every feature is proven by a test."""

import re

from tests.paths import REPOSITORY

_ROOMS = ("benchmarks", "configs", "docs", "engine", "examples", "kernels", "serve", "tests")
_PAGE = (REPOSITORY / "docs" / "lineage.md").read_text(encoding="utf-8")


def test_every_path_exists() -> None:
    paths = [path for path in re.findall(r"`([^`\s]+)`", _PAGE) if path.split("/")[0] in _ROOMS and "/" in path]
    assert len(paths) > 50
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_feature_is_proven_by_a_test() -> None:
    rows = [line.strip("|").split("|") for line in _PAGE.splitlines() if line.startswith("| ")]
    features = [[cell.strip() for cell in row] for row in rows if row[0].strip() != "feature"]
    assert len(features) > 30
    for feature, here, proof in features:
        assert here, feature
        assert "`tests/" in proof, feature
