"""The benchmark of preparing: its delivery is whole, and its parts measure what they say."""

import json
from pathlib import Path

from engine.data.pairs import load_pairs
from tests.benchmark_scripts import run_script


def test_a_generated_delivery_is_prepared_and_read(tmp_path: Path) -> None:
    parts = {}
    for part in ("prepare-60", "read-60"):
        answer = run_script("prepare_scale", "--part", part, "--folder", str(tmp_path), "--quick")
        parts[part] = json.loads(answer.stdout.splitlines()[-1])
    prepared, read = parts.values()
    assert prepared["pairs"] == read["pairs"] == 60
    assert [(piece["from"], piece["to"]) for piece in prepared["pieces"]] == [(0, 60)]
    assert prepared["pairs_per_s"] > 0 < prepared["peak_rss_mib"]
    pairs = load_pairs(tmp_path / "pairs-60")
    assert len(pairs.validation) == 3
    assert len({pair.image_path.read_bytes() for pair in pairs.all}) > 20
