"""The training benchmark on a tiny model: real entry point, figures that add up, reported failures."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmark_scripts import Answer, run_script
from tests.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "train_speed.py"


def run(out: Path, *arguments: str) -> Answer:
    """A quick run; its training is a process of its own."""
    return run_script("train_speed", "--quick", "--out", str(out), *arguments)


def last_line(answer: Answer) -> dict[str, Any]:
    document = json.loads(answer.stdout.splitlines()[-1])
    assert isinstance(document, dict)
    return document


@pytest.mark.slow
def test_figures_add_up_and_are_stored(tmp_path: Path) -> None:
    answer = run(tmp_path, "--dtype", "fp32")
    assert answer.returncode == 0, answer.stderr
    document = last_line(answer)
    (stored,) = (tmp_path / "results" / "train_speed").glob("*-quick.json")
    assert json.loads(stored.read_text(encoding="utf-8")) == document
    (row,) = document["rows"]
    assert (row["dtype"], row["steps"], len(row["losses"])) == ("fp32", 10, 20)
    least, most = row["images_per_s_range"]
    assert 0 < least <= row["images_per_s"] <= most
    assert 0 < row["share_of_peak"] < 1
    assert all(math.isfinite(loss) for loss in row["losses"])
    assert row["loss_first"] == pytest.approx(3.55, abs=0.4)  # (ln 64 + 7 ln 32) / 8: uniform predictions


@pytest.mark.slow
def test_a_training_that_ends_early_is_reported_and_fails(tmp_path: Path) -> None:
    answer = run(tmp_path, "--batch", "4", "loop.stesp=3")
    assert answer.returncode == 1
    document = last_line(answer)
    assert document["rows"] == []
    failure = document["failed"]["fp32, 4"]
    assert (failure["steps"], failure["exit_code"]) == (0, 2)
    assert "error: loop.stesp: 3: unknown key" in failure["output"][-1]
    assert "unknown key" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dtype", "fp8"], "fp8 is none of bf16, fp16, fp32"),
        (["--dtype", "fp16"], "DeepSpeed has no fp16 on CPU"),
        (["--batch", "0"], "batches have 1 image or more"),
        (["--steps", "25"], "--steps must be a multiple of 10"),
        (["--steps", "10"], "--steps must be a multiple of 10, 20 or more"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as when Python runs a script: its neighbours are found
    from train_speed import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
