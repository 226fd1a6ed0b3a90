"""What a single developer's training loop of DALL-E had, a training here has as well: each test names one of its parts."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.training.report import verdicts

EPOCHS, STEPS_AN_EPOCH = 2, 6  # 24 images to train on, 4 a step


@dataclass(frozen=True)
class Trained:
    """A run of two epochs, and what it printed."""

    folder: Path
    lines: list[str]

    def log(self, key: str) -> dict[int, float]:
        """The logged values under a key, by step."""
        entries = [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return {entry["step"]: entry[key] for entry in entries if key in entry}


@pytest.fixture(scope="module")
def trained(
    run_tree: Callable[..., dict[str, Any]],
    train_tree: Callable[[dict[str, Any]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    folder = tmp_path_factory.mktemp("prototype") / "run"
    tree = run_tree("koclip", folder)
    del tree["loop"]["steps"]
    tree["loop"] |= {"epochs": EPOCHS, "checkpoint_every": STEPS_AN_EPOCH, "validate_every": STEPS_AN_EPOCH}
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as printed, contextlib.redirect_stdout(printed):
        patch.setattr("engine.progress.PLAIN_EVERY_S", 0.0)
        train_tree(tree)
        return Trained(folder, printed.getvalue().splitlines())


def test_its_length_is_in_epochs(trained: Trained) -> None:
    assert max(trained.log("loss")) == EPOCHS * STEPS_AN_EPOCH


def test_the_time_left_is_printed_with_the_loss(trained: Trained) -> None:
    line = next(line for line in trained.lines if line.startswith("koclip"))
    assert re.fullmatch(r"koclip \d+/12, \S+ left loss \d\.\d{3}", line), line


def test_the_average_loss_of_held_out_images_is_logged_after_each_epoch(trained: Trained) -> None:
    assert list(trained.log("validation_loss")) == [6, 12]


def test_a_checkpoint_is_written_after_each_epoch(trained: Trained) -> None:
    assert sorted(folder.name for folder in (trained.folder / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000012",
    ]


def test_the_captions_that_were_used_are_recorded(trained: Trained) -> None:
    """By a digest with every checkpoint: with other captions the run does not go on."""
    record = json.loads((trained.folder / "checkpoints" / "step-00000012" / "complete.json").read_text())
    assert {"training captions", "held-out captions"} <= record["inputs"].keys()


def test_a_run_that_was_too_short_is_told_so() -> None:
    found = verdicts.best_step("the transformer", [(100, 5.0), (200, 4.0)], {"taken": "model"})
    assert (found.level, "still improves at its last step" in found.text) == ("fair", True)
    assert "more steps" in found.remedy
