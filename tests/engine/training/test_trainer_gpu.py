"""Training on a GPU: 16-bit weights from float32 masters, fp16's loss scale, the fused optimiser, resumption."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.training.plan.configs import FP16
from tests.paths import REPOSITORY

Tree = dict[str, Any]
# Before a training in this process sets its process group; conftest.py sets the CPU.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def start(file: Path) -> "subprocess.CompletedProcess[str]":
    """`engine/train.py` in a process of its own, on the GPU."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "engine" / "train.py"), "--config", str(file)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train(file: Path) -> None:
    answer = start(file)
    assert answer.returncode == 0, answer.stderr[-3000:]


def log_of(run: Path) -> list[Tree]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "images_per_s" in line]  # the others are validations


@pytest.mark.parametrize(("dtype", "zero"), [("bf16", 0), ("bf16", 1), ("fp16", 1)])
def test_kodalle_trains_and_resumes(
    dtype: str, zero: int, tree_of: Callable[..., Tree], write_tree: Callable[[Tree, Path], Path], tmp_path: Path
) -> None:
    tree = tree_of("kodalle", tmp_path / "run")
    tree["deepspeed"]["optimizer"]["params"]["fused"] = True
    tree["deepspeed"]["zero_optimization"] = {"stage": zero}
    tree["deepspeed"][dtype] = {"enabled": True} if dtype == "bf16" else dict(FP16)
    tree["loop"] |= {"steps": 40, "validate_every": 40, "sample_every": 40, "checkpoint_every": 20}
    file = write_tree(tree, tmp_path / "run.yaml")
    train(file)
    lines = log_of(tmp_path / "run")
    assert len(lines) == 40
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["peak_memory_gib"] > 0
    assert all(0 < line["share_of_peak"] < 1 for line in lines)
    weights = load_file(tmp_path / "run" / "model" / "transformer.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())
    rounded = torch.bfloat16 if dtype == "bf16" else torch.float16  # what is exported are the master copies
    assert any(not torch.equal(value, value.to(rounded).float()) for value in weights.values())
    if dtype == "fp16":
        assert lines[-1]["loss_scale"] > 1
    # From the checkpoint of step 20 it resumes to nearly the same losses: a GPU adds in no fixed order.
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) >= 2
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(tmp_path / "run" / "model")
    train(file)
    again = log_of(tmp_path / "run")
    assert [line["step"] for line in again] == list(range(1, 41))
    assert again[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=0.02)


@pytest.mark.parametrize(("stage", "dtype"), [("vqgan", "bf16"), ("koclip", "fp16")])
def test_the_other_stages_train_in_16_bits(
    stage: str,
    dtype: str,
    tree_of: Callable[..., Tree],
    write_tree: Callable[[Tree, Path], Path],
    tmp_path: Path,
) -> None:
    tree = tree_of(stage, tmp_path / "run")
    tree["deepspeed"] |= {dtype: {"enabled": True}}
    train(write_tree(tree, tmp_path / "run.yaml"))
    weights = load_file(tmp_path / "run" / "model" / f"{stage}.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize("zero", [0, 1])
def test_exploding_numbers_stop_the_run_with_one_line(
    zero: int, tree_of: Callable[..., Tree], write_tree: Callable[[Tree, Path], Path], tmp_path: Path
) -> None:
    """The host reads the verdict of fused optimisers a few steps later; the message names the step all the same."""
    tree = tree_of("kodalle", tmp_path / "run")
    tree["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": zero}, "gradient_clipping": 0.0}
    tree["deepspeed"]["optimizer"] = {"type": "AdamW", "params": {"lr": 1e30, "torch_adam": True, "fused": True}}
    del tree["deepspeed"]["scheduler"]
    tree["loop"] |= {"validate_every": 8, "checkpoint_every": 8}
    answer = start(write_tree(tree, tmp_path / "run.yaml"))
    assert answer.returncode == 2
    assert re.search(r"error: training: step [1-8]: .*: lower the learning rate", answer.stderr.splitlines()[-1])
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()
