"""`attention: auto`: the fastest of those that run; a stand-in clock where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.section import parse_section
from engine.config.stages import KodalleRun
from engine.training import attention_choice
from engine.training.attention_choice import choose_attention
from engine.training.process_group import World

RUN: dict[str, Any] = {
    "run": "r", "stage": "kodalle", "vqgan": "v", "data": {"pairs": "p"}, "loop": {"steps": 1},
    "deepspeed": {"train_micro_batch_size_per_gpu": 1},
}  # fmt: skip


def _run(**changes: Any) -> KodalleRun:
    made: KodalleRun = parse_section(KodalleRun, RUN | changes, source="a test")
    return made


@pytest.mark.parametrize(
    ("seconds", "chosen", "words"),
    [
        ({"sdpa": 2e-3, "xformers": 1e-3}, "xformers", "sdpa 2.00 ms a layer, xformers 1.00 ms a layer"),
        ({"sdpa": 1e-3, "xformers": 2e-3}, "sdpa", "the fastest here"),
        ({"sdpa": 1e-3, "xformers": None}, "sdpa", "the fastest here: sdpa 1.00 ms a layer)"),
        ({"sdpa": None, "xformers": 1e-3}, "xformers", "xformers 1.00 ms a layer)"),
    ],
)
def test_the_fastest_that_runs(
    seconds: dict[str, float | None], chosen: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(attention_choice, "_seconds", lambda run, device, backend: seconds[backend])
    assert choose_attention(_run(), World(0, 1, 0, torch.device("cuda"))) == chosen
    assert words in capsys.readouterr().out


def test_patterns_leave_one() -> None:
    run = _run(model={"attention_patterns": ["axial_row", "full"]})
    assert choose_attention(run, World(0, 1, 0, torch.device("cuda"))) == "sdpa"


def test_what_cannot_run_is_not_timed(tmp_path: Path) -> None:
    tiny = {"dim": 16, "num_heads": 1, "head_dim": 8, "text_seq_len": 8, "image_grid_size": 2}
    assert attention_choice._seconds(_run(model=tiny), torch.device("cpu"), "xformers") is None
    assert attention_choice._seconds(_run(model=tiny), torch.device("cpu"), "sdpa")
