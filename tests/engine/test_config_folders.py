"""`auto` in hand-written configs, and what does not fit, in one message, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.stages import KoclipRun, KodalleRun
from engine.config_files import dump_tree, load_run
from engine.config_folders import check_folders
from engine.errors import InputError
from tests.conftest import DEEPSPEED, KOCLIP, TRANSFORMER, VQGAN

Tree = dict[str, Any]
TOKENIZER = {"model": {"type": "WordPiece", "vocab": {f"word{number}": number for number in range(60)}}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Model folders of a VQGAN and a KoCLIP, as far as their JSON goes."""
    for name, config in (("vqgan", {"vqgan": VQGAN}), ("koclip", {"koclip": KOCLIP})):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"format": 1} | config), encoding="utf-8")
    (tmp_path / "koclip" / "model" / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    return tmp_path


def _tree(runs: Path, stage: str, **more: Any) -> Tree:
    return {
        "stage": stage, "run": str(runs / stage), "data": {"pairs": "pairs"}, "loop": {"steps": 3}, "deepspeed": DEEPSPEED,
    } | more  # fmt: skip


def _load(runs: Path, tree: Tree) -> Any:
    file = runs / "config.yaml"
    file.write_text(dump_tree(tree), encoding="utf-8")
    return load_run(file)


AUTO_MODEL = dict.fromkeys(("image_vocab_size", "image_grid_size", "text_vocab_size", "text_seq_len"), "auto")


def test_a_config_without_matched_numbers(runs: Path) -> None:
    tree = _tree(
        runs, "kodalle", vqgan="auto", koclip="auto", text={"tokenizer": "auto"},
        model=AUTO_MODEL | {"dim": 32, "text_position_rows": "auto"},
    )  # fmt: skip
    run = _load(runs, tree)
    assert isinstance(run, KodalleRun)
    assert run.vqgan == runs / "vqgan" / "model"
    assert run.koclip == Path(run.text.tokenizer) == runs / "koclip" / "model"
    model = run.model
    assert (model.image_vocab_size, model.image_grid_size) == (32, 8)
    assert (model.text_vocab_size, model.text_seq_len, model.text_position_rows) == (64, 12, 13)
    check_folders(run)

    koclip = _load(runs, _tree(
        runs, "koclip", codec="auto", text={"tokenizer": "train", "vocab_size": 99},
        model={"image_size": "auto", "text_vocab_size": "auto", "text_seq_len": 20, "text_position_rows": "auto"},
    ))  # fmt: skip
    assert isinstance(koclip, KoclipRun)
    assert (koclip.codec, koclip.model.image_size) == (runs / "vqgan" / "model", 32)
    assert (koclip.model.text_vocab_size, koclip.model.text_position_rows) == (99, 22)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"vqgan": "nowhere", "model": {"image_vocab_size": "auto"}},
            "vqgan: nowhere/config.json: no such file: model.image",
        ),
        (
            {"vqgan": "auto", "koclip": None, "model": {"text_seq_len": "auto"}},
            "model.text_seq_len: auto: follows from `koclip`",
        ),
        (
            {"vqgan": "auto", "model": {"dim": "auto"}},
            "model.dim: auto: follows from nothing: write a value; what can be auto",
        ),
    ],
)
def test_an_auto_that_follows_from_nothing_is_named(runs: Path, more: Tree, message: str) -> None:
    with pytest.raises(InputError) as caught:
        _load(runs, _tree(runs, "kodalle", **more))
    assert message in str(caught.value)


def _misfit(runs: Path) -> Tree:
    other = runs / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}), encoding="utf-8")
    model = TRANSFORMER | {"image_vocab_size": 7, "image_grid_size": 5}
    return _tree(runs, "kodalle", vqgan="auto", koclip="auto", text={"tokenizer": str(other)}, model=model)


def test_all_faults_are_said_at_once(runs: Path) -> None:
    run = _load(runs, _misfit(runs))
    with pytest.raises(InputError) as caught:
        check_folders(run)
    message = str(caught.value)
    assert message.startswith("config: 3 faults: ")
    assert "model.image_vocab_size 7: the codec in" in message
    assert "has 32 codes" in message
    assert "model.image_grid_size 5: " in message
    assert "makes 8 tokens a side" in message
    assert "text.tokenizer" in message


def test_one_fault_is_a_line_of_its_own(runs: Path) -> None:
    tree = _misfit(runs)
    tree["model"] = dict(TRANSFORMER)
    tree["text"] = {"tokenizer": str(runs / "koclip" / "model")}
    check_folders(_load(runs, tree))
    tree["model"]["text_vocab_size"] = 59
    with pytest.raises(InputError, match=r"model.text_vocab_size: 59: the tokenizer has 60 entries: raise it"):
        check_folders(_load(runs, tree))
    tree["vqgan"] = str(runs / "koclip" / "model")
    with pytest.raises(InputError, match=r"config: 2 faults: vqgan .*has no vqgan"):
        check_folders(_load(runs, tree))


def test_a_start_with_other_sizes_names_them_all(runs: Path) -> None:
    vqgan = _tree(
        runs, "vqgan", model=VQGAN | {"codebook_size": 64, "embed_dim": 9}, start_from=str(runs / "vqgan" / "model")
    )
    with pytest.raises(InputError) as caught:
        check_folders(_load(runs, vqgan))
    assert "model.embed_dim is 9, there 8; model.codebook_size is 64, there 32" in str(caught.value)
    same = _tree(runs, "vqgan", model=VQGAN | {"dropout": 0.1}, start_from=str(runs / "vqgan" / "model"))
    check_folders(_load(runs, same))
    start = str(runs / "koclip" / "model")
    for entries, fits in ((128, True), (63, False)):
        koclip = _load(runs, _tree(runs, "koclip", model=KOCLIP | {"text_vocab_size": entries}, start_from=start))
        if fits:
            check_folders(koclip)
        else:
            with pytest.raises(InputError, match="text_vocab_size is 63, there 64"):
                check_folders(koclip)


@pytest.mark.slow
def test_nothing_heavy_is_imported_before(runs: Path) -> None:
    _load(runs, _misfit(runs))
    program = (
        "import sys; from pathlib import Path; from engine.config_files import load_run\n"
        "from engine.config_folders import check_folders\n"
        "try: check_folders(load_run(Path(sys.argv[1])))\n"
        "except ValueError: print(sorted(set(sys.modules) & {'torch', 'deepspeed', 'transformers', 'tokenizers'}))"
    )
    command = [sys.executable, "-c", program, str(runs / "config.yaml")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
