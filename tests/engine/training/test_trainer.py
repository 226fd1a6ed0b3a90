"""All stages train and in every precision."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.config_files import load_run
from engine.errors import InputError
from engine.models import folder as model_folder
from engine.training.checkpoints import complete_checkpoints
from engine.training.engines import make_engine
from engine.training.process_group import free_port, join_world
from engine.training.stage import make_stage
from tests.conftest import GROUND
from tests.forked import DEEPSPEED
from tests.paths import REPOSITORY

STAGES = ["vqgan", "dvae", "koclip", "kodalle"]
STEPS = 8
Tree = dict[str, Any]
Train = Callable[[Tree], Path]
TreeOf = Callable[..., Tree]
Losses = Callable[[Path], list[Tree]]
Same = Callable[[Path, Path], None]
PRELOAD = [
    *DEEPSPEED,
    "transformers",
    "engine.training.trainer",
    *(f"engine.training.stage_{stage}" for stage in STAGES),
]
ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


# --------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("stage", STAGES)
def test_run_writes_all_its_files(run_of: dict[str, Path], stage: str, losses: Losses) -> None:
    run = run_of[stage]
    names = {path.name for path in run.iterdir()}
    expected = {"config.yaml", "log.jsonl", "tensorboard", "samples", "checkpoints", "model", "model-best"}
    assert expected <= names <= expected | {"shards", ".shards.lock", ".lock"}
    assert load_run(run / "config.yaml").run == run
    lines = losses(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line.keys() >= {"lr", "grad_norm", "loss_scale", "skipped_steps"} for line in steps)
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    assert all(torch.isfinite(torch.tensor(list(line.values()), dtype=torch.float64)).all() for line in lines)
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000008", "step-00000006"]
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000008.png"]
    with Image.open(run / "samples" / "step-00000008.png") as image:
        assert image.size == (2 * 36 + 4, 2 * 36 + 4)


@pytest.mark.parametrize("stage", STAGES)
def test_card_quotes_the_last_validation(run_of: dict[str, Path], stage: str, losses: Losses) -> None:
    last = [line for line in losses(run_of[stage]) if "validation_loss" in line][-1]
    card = (run_of[stage] / "model" / "model_card.md").read_text(encoding="utf-8")
    assert f"- loss: {last['validation_loss']}" in card
    assert "for 8 steps on the captioned images of `squares`" in card


@pytest.mark.parametrize("stage", STAGES)
def test_the_ground_of_cut_outs_reaches_model_and_card(run_of: dict[str, Path], stage: str) -> None:
    for name in ("model", "model-best"):
        assert model_folder.read_ground(run_of[stage] / name) == GROUND
        card = (run_of[stage] / name / "model_card.md").read_text(encoding="utf-8")
        assert f"Its images are cut-outs on a plain ground of `{GROUND}`." in card


def test_best_model_is_the_lowest_validation_loss(kodalle_run: Path, losses: Losses) -> None:
    validation = {line["step"]: line["validation_loss"] for line in losses(kodalle_run) if "validation_loss" in line}
    best = min(validation, key=lambda step: validation[step])
    card = (kodalle_run / "model-best" / "model_card.md").read_text(encoding="utf-8")
    assert f"for {best} steps" in card
    assert f"- loss: {validation[best]}" in card


def test_vqgan_run_went_through_all_its_phases(vqgan_run: Path, losses: Losses) -> None:
    lines = {line["step"]: line for line in losses(vqgan_run) if "loss" in line}
    assert "codebook_usage" not in lines[2]
    assert "codebook_usage" in lines[3]
    assert "discriminator" not in lines[3]
    assert "discriminator" in lines[4]


def test_kodalle_learns(kodalle_run: Path, losses: Losses) -> None:
    lines = [line for line in losses(kodalle_run) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert abs(lines[0]["loss_image"] - 3.4657) < 0.3  # ln 32: the loss of uniform predictions


# ------------------------------------------------------------------------------------------- precision, accumulation


def exact(tree: Tree) -> Tree:
    """Without dropout, which depends on the grouping of images, and with an optimiser that is insensitive to rounding."""
    tree["model"] |= {"attention_dropout": 0.0, "ff_dropout": 0.0}
    tree["deepspeed"]["optimizer"]["params"]["eps"] = 1e-3
    tree["loop"] |= {"steps": 4, "validate_every": 4, "sample_every": 4, "checkpoint_every": 4}
    return tree


@pytest.fixture(scope="module")
def exact_run(tree_of: TreeOf, train_tree: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, batches of four."""
    run = tmp_path_factory.mktemp("exact") / "run"
    tree = exact(tree_of("kodalle", run))
    tree["deepspeed"]["zero_optimization"] = {"stage": 1}  # where DeepSpeed computes the gradient norm
    train_tree(tree)
    return run


def close(model: Path, other: Path, tolerance: float, *, part: str = "transformer") -> None:
    ours, theirs = (load_file(folder / f"{part}.safetensors") for folder in (model, other))
    assert ours.keys() == theirs.keys()
    worst = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(worst.values()) <= tolerance, max(worst.items(), key=lambda item: item[1])


def same_norms(run: Path, other: Path, losses: Losses) -> None:
    norms = [[line["grad_norm"] for line in losses(folder) if "loss" in line] for folder in (run, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_accumulated_equals_one_batch(
    exact_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path, losses: Losses
) -> None:
    tree = exact(tree_of("kodalle", tmp_path / "run"))
    tree["deepspeed"] |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    close(train_tree(tree), exact_run / "model", 1e-5)
    same_norms(tmp_path / "run", exact_run, losses)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_bf16_runs_on_cpu(zero: int, exact_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path) -> None:
    tree = exact(tree_of("kodalle", tmp_path / "run"))
    tree["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": zero}}
    model = train_tree(tree)
    weights = load_file(model / "transformer.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())  # the master copies
    close(model, exact_run / "model", 5e-3)


@pytest.mark.parametrize(("stage", "zero"), [("vqgan", 2), ("dvae", 0), ("dvae", 3), ("koclip", 1), ("koclip", 3)])
def test_other_stages_in_bf16_and_sharded(
    stage: str, zero: int, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = tree_of(stage, tmp_path / "run")
    tree["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": zero}}
    tree["loop"]["steps"] = 5 if stage == "vqgan" else 2  # the discriminator joins after three
    model = train_tree(tree)
    (weights,) = model.glob("*.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(weights).values())


@pytest.mark.parametrize("stage", STAGES)
def test_without_held_out_images_it_trains_and_does_not_validate(
    stage: str, pairs_folder: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path, losses: Losses
) -> None:
    """As in a prepared folder of a few images, of which none may be in the validation split."""
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    lines = (pairs_folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["split"] == "train"]
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(kept), encoding="utf-8")
    tree = tree_of(stage, tmp_path / "run")
    tree["data"] |= {"pairs": str(tmp_path / "pairs"), "cache_images": True}
    tree["loop"] |= {"steps": 2, "sample_every": 2}
    model = train_tree(tree)
    assert (model / "config.json").is_file()
    assert not (tmp_path / "run" / "model-best").exists()
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("stage", ["koclip", "kodalle"])
def test_partial_captions_reach_the_batches(
    stage: str, pairs_folder: Path, tree_of: TreeOf, write_tree: Callable[[Tree, Path], Path], tmp_path: Path
) -> None:
    """Every second visit or so reads one of a caption's two sentences; held-out captions stay whole."""
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    file = tmp_path / "pairs" / "pairs.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text(
        "".join(
            json.dumps(line | {"caption": "가 나. 다 라.", "captions": ["가 나. 다 라."]}) + "\n" for line in lines
        ),
        encoding="utf-8",
    )
    tree = tree_of(stage, tmp_path / "run", text={"tokenizer": "train", "vocab_size": 60, "partial_captions": 1})
    tree["data"] |= {"pairs": str(tmp_path / "pairs")}
    if stage == "kodalle":
        tree |= {"koclip": None, "caption_dropout": 0.0}
    run = load_run(write_tree(tree, tmp_path / "run.yaml"))
    made: Any = make_stage(run, join_world(torch_threads=None))

    def captions(source: Any) -> set[str]:
        length = run.model.text_seq_len  # type: ignore[union-attr]
        known = {
            text: tuple(made.tokenizer.encode([text], length).tokens[0].tolist())
            for text in ("가 나. 다 라.", "가 나.", "다 라.")
        }
        found = {tuple(row) for number in range(6) for row in source(number)["text_tokens"].tolist()}
        assert found <= set(known.values())
        return {text for text, tokens in known.items() if tokens in found}

    assert captions(made.source) == {"가 나. 다 라.", "가 나.", "다 라."}
    assert captions(made.validation_source) == {"가 나. 다 라."}


# ------------------------------------------------------------------------------------------------------- the launcher


@pytest.mark.slow
def test_deepspeed_launcher_trains_the_same(
    kodalle_run: Path,
    tree_of: TreeOf,
    write_tree: Callable[..., Path],
    losses: Losses,
    same_weights: Same,
    tmp_path: Path,
) -> None:
    file = write_tree(tree_of("kodalle", tmp_path / "elsewhere"), tmp_path / "run.yaml")
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--master_port", str(free_port()), "engine/train.py"]
    answer = subprocess.run(
        [*command, "--config", str(file), f"run={tmp_path / 'run'}", "loop.log_every=1"],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{tmp_path / 'run' / 'model'} written after" in answer.stdout
    assert losses(tmp_path / "run") == losses(kodalle_run)
    same_weights(tmp_path / "run" / "model", kodalle_run / "model")


def test_engine_takes_the_runs_length_for_auto() -> None:
    join_world(torch_threads=1)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 1}},
    }
    engine: Any = make_engine(torch.nn.Linear(2, 2), settings, total_steps=77)
    assert engine.lr_scheduler.total_num_steps == 77
    assert settings["scheduler"]["params"]["total_num_steps"] == "auto"  # type: ignore[index]


def test_attention_is_chosen_and_said_once(
    tree_of: TreeOf, train_tree: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tree_of("kodalle", tmp_path / "run")
    tree["loop"]["steps"] = 1
    train_tree(tree)
    assert capsys.readouterr().out.count("attention: sdpa (the fused one of a CPU)") == 1
    with pytest.raises(InputError, match=r"attention backend: xformers: .*CUDA only"):
        train_tree(tree | {"run": str(tmp_path / "other"), "attention": "xformers"})
