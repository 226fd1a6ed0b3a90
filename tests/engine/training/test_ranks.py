"""Several ranks compute what one does: every ZeRO stage, optimizer and weights offloaded, the average of the weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config_files import load_run
from engine.training import trainer
from engine.training.checkpoints import complete_checkpoints
from engine.training.process_group import free_port
from tests.engine.training.test_trainer import PRELOAD, Losses, Train, Tree, TreeOf, close, exact, same_norms
from tests.forked import run_forked

OFFLOADED = {"device": "cpu", "pin_memory": False}
# In the `deepspeed:` section of each run, or at the config's top where the key is there.
VARIANTS: dict[str, Tree] = {
    "zero-0": {"zero_optimization": {"stage": 0}},
    "zero-1": {"zero_optimization": {"stage": 1}},
    "zero-2": {"zero_optimization": {"stage": 2}, "ema_decay": 0.5},
    "zero-3": {"zero_optimization": {"stage": 3}},
    "zero-2-offloaded": {
        "zero_optimization": {"stage": 2, "offload_optimizer": OFFLOADED}, "zero_force_ds_cpu_optimizer": False,
    },
    "zero-3-offloaded": {
        "zero_optimization": {"stage": 3, "offload_optimizer": OFFLOADED, "offload_param": OFFLOADED},
        "zero_force_ds_cpu_optimizer": False,
    },
}  # fmt: skip
# Of two ranks in `make test`, all of four in `make soak`: stage 1 is stage 2 with whole gradients.
TWO = ("zero-0", "zero-2", "zero-3", "zero-2-offloaded")


def train_as_rank(rank: int, size: int, port: int, files: list[Path]) -> None:
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    pytest.MonkeyPatch().setattr(trainer, "matrix_peak", lambda *_: 1e12)
    for file in files:
        trainer.train(load_run(file))


def _tree(tree: Tree, variant: str, batch: int) -> Tree:
    changes = dict(VARIANTS[variant])
    if "ema_decay" in changes:
        tree["ema_decay"] = changes.pop("ema_decay")
    tree["deepspeed"] |= changes | {"train_micro_batch_size_per_gpu": batch}
    return exact(tree)


Runs = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def run_of_ranks(tree_of: TreeOf, write_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run of a variant by several gloo processes, which share the batch of four; all variants in the same processes."""
    folder = tmp_path_factory.mktemp("ranks")

    def run(size: int, variant: str) -> Path:
        if not (folder / f"{size}").exists():
            (folder / f"{size}").mkdir()
            files = [
                write_tree(_tree(tree_of("kodalle", folder / f"{size}" / name), name, 4 // size), folder / f"{size}-{name}.yaml")
                for name in (TWO if size == 2 else VARIANTS)
            ]  # fmt: skip
            port = free_port()
            jobs: list[Any] = [(train_as_rank, (rank, size, port, files)) for rank in range(size)]
            answers = run_forked(jobs, folder, preload=PRELOAD)
            assert [code for code, _ in answers] == [0] * size, answers
        return folder / f"{size}" / variant

    return run


@pytest.fixture(scope="module")
def run_of_one(tree_of: TreeOf, train_tree: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One process with batches of four; ZeRO stage 1, where DeepSpeed computes the gradient norm."""
    folder = tmp_path_factory.mktemp("one")

    def run(variant: str) -> Path:
        ema = "ema_decay" in VARIANTS[variant]
        place = folder / f"ema-{ema}"
        if not place.exists():
            tree = exact(tree_of("kodalle", place, **({"ema_decay": 0.5} if ema else {})))
            tree["deepspeed"]["zero_optimization"] = {"stage": 1}
            train_tree(tree)
        return place

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "variant"),
    [(2, name) for name in TWO] + [pytest.param(4, name, marks=pytest.mark.soak) for name in VARIANTS],
)
def test_ranks_equal_one_with_the_whole_batch(
    size: int, variant: str, run_of_ranks: Runs, run_of_one: Callable[[str], Path], losses: Losses
) -> None:
    run, one = run_of_ranks(size, variant), run_of_one(variant)
    close(run / "model", one / "model", 1e-5)
    same_norms(run, one, losses)
    logged = [[line["loss"] for line in losses(folder) if "loss" in line] for folder in (run, one)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)  # the whole batch's, not rank 0's share
    validation = [
        [line["validation_loss"] for line in losses(folder) if "validation_loss" in line] for folder in (run, one)
    ]
    assert validation[0] == pytest.approx(validation[1], rel=2e-2)  # other batches of held-out images
    marker = json.loads((complete_checkpoints(run / "checkpoints")[0] / "complete.json").read_text())
    assert marker["processes"] == size
