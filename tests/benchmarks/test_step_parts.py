"""The benchmark of a step's parts runs: parts add up to the step, and each has a floor where it reads or computes something."""

import json
from pathlib import Path

import pytest

from engine.decoding.cpu.compiled_step import library
from kernels.decode_step import PARTS
from tests.benchmark_scripts import run_script


@pytest.mark.skipif(library() is None, reason="the compiled step was not built here")
def test_parts_of_a_step_and_of_a_generation(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--steps", "2", "--quick"]
    run_script("step_parts", "--weights", "int8", "--cases", "1", "1 x 8", *out)
    answer = run_script("step_parts", "--models", "garments", *out)
    document = json.loads(answer.stdout.splitlines()[-1])
    [stored] = (tmp_path / "results" / "step_parts").iterdir()
    assert document == json.loads(stored.read_text(encoding="utf-8"))
    assert [row["case"] for row in document["rows"]] == ["1", "1 x 8", "single steps", "speculative"]
    for row in document["rows"]:
        assert set(row["parts"]) == {*PARTS, "Python"}
        assert row["ms"] == pytest.approx(sum(part["ms"] for part in row["parts"].values()), rel=1e-2)
        for name in ("norms", "qkv", "attention", "out", "grow", "activation", "shrink", "head", "sampling"):
            assert min(row["parts"][name]["ms"], row["parts"][name]["floor_ms"]) > 0, name
    assert document["rows"][2]["steps"] == 36  # tokens of an image
    assert document["rows"][3]["steps"] < 36
