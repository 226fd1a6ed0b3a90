"""PowerSGD between two processes: exact at full rank, nothing lost at rank 1, and resumed to the same bits."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.config.run import PowerSgdConfig
from engine.config_files import load_run
from engine.errors import InputError
from engine.training import trainer
from engine.training.power_sgd import PowerSgd
from engine.training.process_group import World, free_port, join_world
from tests.engine.training.test_trainer import PRELOAD, Losses, Same, Train, Tree, TreeOf
from tests.forked import run_forked

SHAPES = ((12, 20), (6, 5, 3), (7,))


def _become(rank: int, port: int) -> World:
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return join_world(torch_threads=1)


def average_as_rank(rank: int, port: int, out: Path) -> None:
    """Five averages of this rank's gradients at three ranks of the factors; writes how far they are from the exact means."""
    world = _become(rank, port)
    found: dict[str, Any] = {}
    for name, columns, start in (("full", 12, 0), ("thin", 1, 0), ("later", 1, 5)):
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        made = PowerSgd(parameters, PowerSgdConfig(rank=columns, start_step=start), world, seed=1, least_rate=0.01)
        averaged = [torch.zeros(shape) for shape in SHAPES]
        exact = [torch.zeros(shape) for shape in SHAPES]
        distances = []
        for step in range(5):
            both = [torch.Generator().manual_seed(100 * step + one) for one in range(2)]
            drawn = [[torch.randn(shape, generator=generator) for shape in SHAPES] for generator in both]
            for number, parameter in enumerate(parameters):
                parameter.grad = drawn[rank][number].clone()
                exact[number] += (drawn[0][number] + drawn[1][number]) / 2
            made.average()
            for number, parameter in enumerate(parameters):
                assert parameter.grad is not None
                averaged[number] += parameter.grad
            distances.append(max(float((one - other).abs().max()) for one, other in zip(averaged, exact, strict=True)))
        # What was not sent is in the errors: sums and errors together are exact.
        for number, error in enumerate(made._errors):
            mean = world.sum_(error.clone()) / 2
            averaged[number] += mean.view(SHAPES[number])
        with_errors = max(float((one - other).abs().max()) for one, other in zip(averaged, exact, strict=True))
        found[name] = {"distances": distances, "with_errors": with_errors, "sent": made.sent_numbers()}
        found[name]["sums"] = [float(one.double().sum()) for one in averaged]
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_exact_at_full_rank_and_nothing_is_lost_at_rank_one(tmp_path: Path) -> None:
    out, port = tmp_path / "found", free_port()
    answers = run_forked([(average_as_rank, (rank, port, out)) for rank in range(2)], tmp_path, preload=PRELOAD)
    assert [code for code, _ in answers] == [0, 0], answers
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first["full"]["distances"][-1] < 1e-5
    assert first["thin"]["distances"][-1] > 0.1
    assert first["thin"]["with_errors"] < 1e-5
    assert first["thin"]["sent"] == [7 + (12 + 20) + (6 + 15), 7 + 240 + 90]
    assert first["later"]["distances"][-1] < 1e-6  # exact until it starts
    sums = [np.concatenate([np.ravel(one["sums"]) for one in found.values()]) for found in (first, second)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)


def train_as_rank(rank: int, port: int, files: list[Path]) -> None:
    """Trains one config after the other; before the last one it loses the newest checkpoint and the model."""
    _become(rank, port)
    pytest.MonkeyPatch().setattr(trainer, "matrix_peak", lambda *_: 1e12)
    for number, file in enumerate(files):
        run = load_run(file)
        if number == len(files) - 1:
            if rank == 0:
                shutil.rmtree(run.run / "checkpoints" / "step-00000008")
                shutil.rmtree(run.run / "model")
            torch.distributed.barrier()
        trainer.train(run)


@pytest.mark.slow
def test_a_compressed_training_learns_and_resumes_to_the_same_bits(
    tree_of: TreeOf, write_tree: Callable[..., Path], losses: Losses, same_weights: Same, tmp_path: Path
) -> None:
    files = []
    for name in ("whole", "again"):
        tree = tree_of("kodalle", tmp_path / name, gradient_compression={"rank": 2, "start_step": 2})
        files.append(write_tree(tree, tmp_path / f"{name}.yaml"))
    port = free_port()
    jobs: list[Any] = [(train_as_rank, (rank, port, [*files, files[-1]])) for rank in range(2)]
    answers = run_forked(jobs, tmp_path, preload=PRELOAD)
    assert [code for code, _ in answers] == [0, 0], answers
    assert "gradients are compressed" in answers[0][1]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert losses(again) == losses(whole)
    same_weights(again / "model", whole / "model")
    lines = [line for line in losses(whole) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "gradient_compression: ZeRO stage 1: averages whole gradients"),
        ({"zero_optimization": {"stage": 2}}, "gradient_compression: ZeRO stage 2: averages whole gradients"),
    ],
)
def test_what_it_cannot_do_is_refused(
    changes: Tree, message: str, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = tree_of("kodalle", tmp_path / "run", gradient_compression={})
    tree["deepspeed"] |= changes
    with pytest.raises(InputError, match=message):
        train_tree(tree)
