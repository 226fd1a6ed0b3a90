"""What the KoDALLE stage does before its first step: token shards that are reused or written again, captions that are cut."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.config_files import load_run
from engine.errors import InputError
from engine.training.process_group import join_world
from engine.training.stage_kodalle import KodalleStage
from tests.engine.training.config_trees import Tree, with_value

TreeOf = Callable[..., Tree]


@pytest.fixture
def make_stage(
    tree_of: TreeOf,
    write_tree: Callable[..., Path],
    kodalle_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Starts KoDALLE runs on one shard folder, a copy of the session's, without training; returns their output."""
    shutil.copytree(kodalle_run / "shards", tmp_path / "shards")

    def make(**changes: Any) -> str:
        tree = tree_of("kodalle", tmp_path / "run", token_shards=str(tmp_path / "shards"))
        for key, value in changes.items():
            with_value(tree, key.replace("__", "."), value)
        KodalleStage(load_run(write_tree(tree, tmp_path / "run.yaml")), join_world(torch_threads=1))  # type: ignore[arg-type]
        return capsys.readouterr().out

    return make


def test_shards_are_reused_or_written_again(make_stage: Callable[..., str], pairs_folder: Path, tmp_path: Path) -> None:
    assert "encoding images" not in make_stage()
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    lines = (pairs_folder / "pairs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "pairs" / "pairs.jsonl").write_text(lines.replace("빨강 바탕에", "빨강 배경에"), encoding="utf-8")
    assert "encoding images" in make_stage(data__pairs=str(tmp_path / "pairs"))
    assert "encoding images" in make_stage()
    assert "encoding images" not in make_stage()


def test_other_vqgan_weights_make_other_shards(make_stage: Callable[..., str], vqgan_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "vqgan"
    shutil.copytree(vqgan_run / "model", other)
    weights = load_file(other / "vqgan.safetensors")
    weights["quant_conv.bias"] += 0.1
    save_file(weights, other / "vqgan.safetensors")
    (other / "SHA256SUMS").unlink()
    assert "encoding images" in make_stage(vqgan=str(other))


def test_cut_captions_are_reported_or_rejected(make_stage: Callable[..., str], tmp_path: Path) -> None:
    message = make_stage(model__text_seq_len=4)
    assert "note: the captions of 30 images are too long and were cut" in message
    with pytest.raises(InputError, match="strict_captions: True: 30 images have captions of more"):
        make_stage(model__text_seq_len=4, strict_captions=True)
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(InputError, match=r"caption: .* more than the model's 4"):
        make_stage(model__text_seq_len=4, strict_captions=True)
