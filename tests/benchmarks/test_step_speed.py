"""The step benchmark runs, and goes on from what is stored."""

import json
from pathlib import Path

import pytest

from engine.decoding.cpu.compiled_step import library
from tests.benchmark_scripts import run_script


@pytest.mark.skipif(library() is None, reason="the compiled step was not built here")
def test_rows_are_added_to_those_that_are_stored(tmp_path: Path) -> None:
    for weights in ("int8", "float32"):
        answer = run_script(
            "step_speed", "--quick", "--steps", "2", "--sequences", "1", "--processor-time", "--weights", weights,
            "--out", str(tmp_path),
        )  # fmt: skip
    document = json.loads(answer.stdout.splitlines()[-1])
    [stored] = (tmp_path / "results" / "step_speed").iterdir()
    assert document == json.loads(stored.read_text(encoding="utf-8"))
    ways = {row["weights"]: set(row["ways"]) for row in document["rows"]}
    assert ways == {"int8": {"compiled", "operators"}, "float32": {"compiled", "operators", "cached loop"}}
    assert all(row["read_floor_ms"] > 0 for row in document["rows"])
