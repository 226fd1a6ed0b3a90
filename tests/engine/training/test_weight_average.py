"""`ema_decay`: what is averaged, exported, validated, and kept over an interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import InputError
from engine.training import trainer
from engine.training.weights import full_weights
from tests.engine.training.test_trainer import Losses, Same, Train, TreeOf

DECAY = 0.7


def _record(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The whole weights after each step, by the trainer's own engine."""
    seen: list[dict[str, torch.Tensor]] = []
    step = trainer.Trainer._step

    def recorded(self: trainer.Trainer, batches: Any) -> Any:
        if not seen:
            seen.append(full_weights(self.main))
        scalars = step(self, batches)
        seen.append(full_weights(self.main))
        return scalars

    monkeypatch.setattr(trainer.Trainer, "_step", recorded)
    return seen


@pytest.mark.parametrize(("zero", "bf16"), [(0, False), (0, True), (2, True)])
def test_the_average_of_the_weights_is_exported_and_not_trained_on(
    zero: int, bf16: bool, tree_of: TreeOf, train_tree: Train, losses: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    changes = {"zero_optimization": {"stage": zero}} | ({"bf16": {"enabled": True}} if bf16 else {})
    plain, averaged = (tree_of("kodalle", tmp_path / name) for name in ("plain", "averaged"))
    for tree in (plain, averaged):
        tree["deepspeed"] |= changes
    train_tree(plain)
    seen = _record(monkeypatch)
    model = train_tree(averaged | {"ema_decay": DECAY})
    expected = {name: value.clone() for name, value in seen[0].items()}
    for number, weights in enumerate(seen[1:], start=1):
        decay = min(DECAY, (1 + number) / (10 + number))
        for name, value in weights.items():
            expected[name].lerp_(value, 1 - decay)
    found = load_file(model / "transformer.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    last = load_file(tmp_path / "plain" / "model" / "transformer.safetensors")
    assert any(not torch.equal(found[name], last[name]) for name in found)
    # The trainings are the same, validations apart: the average only looked on.
    logs = [[line for line in losses(tmp_path / name) if "loss" in line] for name in ("plain", "averaged")]
    assert logs[0] == logs[1]
    validations = [
        [line["validation_loss"] for line in losses(tmp_path / name) if "validation_loss" in line]
        for name in ("plain", "averaged")
    ]
    assert validations[0] != validations[1]


@pytest.mark.parametrize(("stage", "zero"), [("kodalle", 0), ("kodalle", 1), ("vqgan", 2)])
def test_resumed_to_the_same_bits(
    stage: str, zero: int, tree_of: TreeOf, train_tree: Train, losses: Losses, same_weights: Same, tmp_path: Path
) -> None:
    def tree(name: str) -> dict[str, Any]:
        made = tree_of(stage, tmp_path / name, ema_decay=DECAY)
        made["deepspeed"]["zero_optimization"] = {"stage": zero}
        return made

    train_tree(tree("whole"))
    train_tree(tree("again"))
    run = tmp_path / "again"
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    shutil.rmtree(run / "model")
    train_tree(tree("again"))  # from step 6
    assert losses(run) == losses(tmp_path / "whole")
    same_weights(run / "model", tmp_path / "whole" / "model")


def test_what_it_cannot_do_is_refused(kodalle_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path) -> None:
    tree = tree_of("kodalle", tmp_path / "run", ema_decay=DECAY)
    tree["deepspeed"]["zero_optimization"] = {"stage": 3}
    with pytest.raises(InputError, match=r"ema_decay: 0.7: needs whole weights"):
        train_tree(tree)
    shutil.copytree(kodalle_run, tmp_path / "plain")
    with pytest.raises(InputError, match=r"ema_decay: 0.7: .*was started with None"):
        train_tree(tree_of("kodalle", tmp_path / "plain", ema_decay=DECAY))
