"""What changed under a started run is one line that names it, and nothing of the run is touched."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from engine.errors import InputError
from engine.files import file_digest
from engine.training.checkpoints import complete_checkpoints, newest_marker, write_marker
from tests.engine.training.config_trees import Tree, with_value
from tests.paths import REPOSITORY

Train = Callable[[Tree], Path]
TreeOf = Callable[..., Tree]


@pytest.fixture
def started(kodalle_run: Path, tmp_path: Path) -> Path:
    """A copy of the session's KoDALLE run, its last step undone."""
    shutil.copytree(kodalle_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("model.dim", 64, "32"),
        ("model.text_seq_len", 11, "12"),
        ("deepspeed.optimizer", {"type": "SGD", "params": {"lr": 0.1}}, "AdamW"),
        ("seed", 4, "3"),
        ("loss_image_weight", 1.0, "7.0"),
        ("loop.steps", 7, "8"),
        ("data.flip", True, "False"),
    ],
)
def test_changed_config_is_rejected_by_name_and_nothing_is_touched(
    key: str, value: Any, before: str, started: Path, tree_of: TreeOf, train_tree: Train
) -> None:
    files = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"{key}: .*was started with .*{before}.*: undo the change") as caught:
        train_tree(with_value(tree_of("kodalle", started), key, value))
    assert caught.value.field == key
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == files


def test_intervals_of_output_may_change(started: Path, tree_of: TreeOf, train_tree: Train) -> None:
    tree = tree_of("kodalle", started)
    tree["loop"] |= {"keep_checkpoints": 1, "log_every": 2}
    tree["data"]["num_workers"] = 1
    train_tree(tree)
    assert [path.name for path in complete_checkpoints(started / "checkpoints")] == ["step-00000008"]
    assert yaml.safe_load((started / "config.yaml").read_text())["loop"]["keep_checkpoints"] == 1


@pytest.fixture
def own_pairs(pairs_folder: Path, tmp_path: Path) -> Path:
    """A copy of the session's pairs, in another place."""
    return Path(shutil.copytree(pairs_folder, tmp_path / "pairs"))


def _first_caption_corrected(pairs: Path, split: str) -> None:
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = next(line for line in lines if line["split"] == split)
    chosen["captions"] = [chosen["caption"] + "!", *chosen["captions"][1:]]
    chosen["caption"] = chosen["captions"][0]
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _swapped(pairs: Path, one: str, other: str) -> None:
    first, second = pairs / "images" / one, pairs / "images" / other
    first.rename(pairs / "x")
    second.rename(first)
    (pairs / "x").rename(second)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda pairs: _first_caption_corrected(pairs, "train"), "training captions"),
        (lambda pairs: _first_caption_corrected(pairs, "validation"), "held-out captions"),
        (lambda pairs: _swapped(pairs, "00.png", "01.png"), "training images"),
        (lambda pairs: _swapped(pairs, "28.png", "29.png"), "held-out images"),
    ],
)
def test_changed_data_is_refused_by_name_and_nothing_is_touched(
    change: Callable[[Path], None], field: str, started: Path, own_pairs: Path, tree_of: TreeOf, train_tree: Train
) -> None:
    change(own_pairs)
    tree = tree_of("kodalle", started)
    tree["data"]["pairs"] = str(own_pairs)
    files = {path: path.read_bytes() for path in started.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"^{field}: {own_pairs}: differs from what .* was started with: restore it"):
        train_tree(tree)
    assert {path: path.read_bytes() for path in started.rglob("*") if path.is_file()} == files


def test_another_tokenizer_or_vqgan_at_the_same_path_is_refused(
    started: Path, kodalle_parts: Tree, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    vqgan = Path(shutil.copytree(kodalle_parts["vqgan"], tmp_path / "vqgan"))
    weights = load_file(vqgan / "vqgan.safetensors")
    weights["quant_conv.bias"] += 0.1
    save_file(weights, vqgan / "vqgan.safetensors")
    (vqgan / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=rf"^vqgan: {vqgan}: differs from what"):
        train_tree(tree_of("kodalle", started, vqgan=str(vqgan)))
    tokenizer = Path(shutil.copytree(kodalle_parts["koclip"], tmp_path / "tokenizer")) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace("네모", "세모"), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^text.tokenizer: {tokenizer.parent}: differs from what"):
        train_tree(tree_of("kodalle", started, text={"tokenizer": str(tokenizer.parent)}))


def test_moved_data_and_damaged_shards_change_no_loss(
    kodalle_run: Path, started: Path, own_pairs: Path, tree_of: TreeOf, train_tree: Train,
    losses: Callable[[Path], list[Tree]], same_weights: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shard = started / "shards" / "train" / "image_tokens-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    tree = tree_of("kodalle", started)
    tree["data"]["pairs"] = str(own_pairs)
    train_tree(tree)
    assert (
        "are damaged: train/image_tokens-00000.npy has other bytes than were written: they are"
        in capsys.readouterr().out
    )
    assert losses(started) == losses(kodalle_run)
    same_weights(started / "model", kodalle_run / "model")


def test_finished_run_can_be_made_longer(
    kodalle_run: Path, tree_of: TreeOf, train_tree: Train, losses: Callable[[Path], list[Tree]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(kodalle_run, tmp_path / "run"))
    tree = tree_of("kodalle", run)
    tree["loop"]["steps"] = 10
    train_tree(tree)
    lines = losses(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert lines[: len(losses(kodalle_run))] == losses(kodalle_run)
    assert "for 10 steps" in (run / "model" / "model_card.md").read_text(encoding="utf-8")


def test_run_that_another_process_writes_is_refused(started: Path, tree_of: TreeOf, train_tree: Train) -> None:
    code = "import sys; from pathlib import Path; from engine.folder_lock import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), field='run'): print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(started / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"^run: {started}: process {other.pid} on .* works there: wait"):
            train_tree(tree_of("kodalle", started))
        other.kill()


def test_a_run_started_before_a_field_was_added_resumes(started: Path, tree_of: TreeOf, train_tree: Train) -> None:
    config = yaml.safe_load((started / "config.yaml").read_text())
    del config["text"]["partial_captions"], config["input_token_noise"], config["augmented_views"]
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    tree = tree_of("kodalle", started)
    with pytest.raises(InputError, match=r"input_token_noise: 0.5: .*was started with 0.0"):  # the config sets it now
        train_tree(tree)
    config["input_token_noise"] = tree["input_token_noise"]
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    train_tree(tree)
    assert complete_checkpoints(started / "checkpoints")[0].name == "step-00000008"


def test_a_run_started_with_a_field_that_was_removed_is_rejected(
    started: Path, tree_of: TreeOf, train_tree: Train
) -> None:
    config = yaml.safe_load((started / "config.yaml").read_text()) | {"warp": 9}
    (started / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"warp: None: .*was started with 9"):
        train_tree(tree_of("kodalle", started))


def test_resume_never_does_not_overwrite(started: Path, tree_of: TreeOf, train_tree: Train) -> None:
    with pytest.raises(InputError, match=r"resume: never: .*holds a run of 6 steps"):
        train_tree(tree_of("kodalle", started, resume="never"))


def test_checkpoint_of_another_world_is_rejected(started: Path, tree_of: TreeOf, train_tree: Train) -> None:
    newest = newest_marker(started / "checkpoints")
    assert newest is not None
    write_marker(started / "checkpoints" / "step-00000006", replace(newest, processes=8))
    with pytest.raises(InputError, match=r"number of processes: 1: .*is of 8"):
        train_tree(tree_of("kodalle", started))


def test_checkpoint_with_other_content_is_rejected(
    started: Path, koclip_run: Path, tree_of: TreeOf, train_tree: Train
) -> None:
    state = started / "checkpoints" / "step-00000006" / "kodalle" / "state" / "mp_rank_00_model_states.pt"
    other = koclip_run / "checkpoints" / "step-00000006" / "koclip" / "state" / "mp_rank_00_model_states.pt"
    newest = newest_marker(started / "checkpoints")
    assert newest is not None
    shutil.copy(other, state)
    digests = newest.files | {"kodalle/state/mp_rank_00_model_states.pt": file_digest(state)}
    write_marker(started / "checkpoints" / "step-00000006", replace(newest, files=digests))
    with pytest.raises(InputError, match="does not fit this config"):
        train_tree(tree_of("kodalle", started))
