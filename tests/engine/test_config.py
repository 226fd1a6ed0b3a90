"""Configuration: strict, faults are named, and what is written is what is read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.codec import VqganConfig
from engine.config.section import parse_section
from engine.config.stages import KodalleRun, VqganRun
from engine.config_files import dump_yaml, load_run
from engine.errors import InputError
from tests.paths import REPOSITORY

# Of training runs; what lies beside them is for servers (tests/serve/test_configs.py).
SHIPPED = sorted((REPOSITORY / "configs").glob("*/**/*.yaml"))
MINIMAL: dict[str, Any] = {
    "stage": "vqgan",
    "run": "runs/x",
    "data": {"pairs": "pairs"},
    "loop": {"steps": 5},
    "deepspeed": {"train_micro_batch_size_per_gpu": 2},
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | changes, allow_unicode=True), encoding="utf-8")
        return path

    return make


def _fault(path: Path, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_run(path, list(overrides))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shipped_config_loads_and_comes_back(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(run), encoding="utf-8")
    assert load_run(again) == run


def test_defaults_are_the_published_sizes(write: Write) -> None:
    run = load_run(write())
    assert isinstance(run, VqganRun)
    assert (run.model.grid_size, run.model.image_seq_len, run.model.codebook_size) == (16, 256, 16384)
    transformer = load_run(write(stage="kodalle", vqgan="v"))
    assert isinstance(transformer, KodalleRun)
    assert (transformer.model.prefix_len, transformer.model.joint_vocab_size) == (129, 32000 + 128 + 16384)


def test_round_trip_keeps_every_kind_of_value(write: Write, tmp_path: Path) -> None:
    path = write(
        stage="kodalle",
        vqgan="모델/코덱",
        deepspeed={"train_micro_batch_size_per_gpu": 2, "optimizer": {"params": {"lr": 1e-6, "betas": [0.9, 0.96]}}},
        loop={"epochs": 0.5},
        caption_dropout=1e-12,
    )
    run = load_run(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(run), encoding="utf-8")
    assert load_run(again) == run
    assert "모델/코덱" in again.read_text(encoding="utf-8")


GPU_CONFIGS = [path for path in SHIPPED if path.parent.name in ("kodalle", "gpu")]


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_gpu_configs_take_torchs_fused_optimiser(path: Path) -> None:
    """DeepSpeed's own is compiled at the first start, which a machine without nvcc cannot."""
    parameters = load_run(path).deepspeed["optimizer"]["params"]
    assert parameters["torch_adam"]
    assert parameters["fused"]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"stpes": 3}, "stpes", "unknown key"),
        ({"model": {"codebook_sise": 3}}, "model.codebook_sise", "unknown key"),
        ({"loop": {"steps": "many"}}, "loop.steps", "integer"),
        ({"loop": {"steps": "100"}}, "loop.steps", "integer"),
        ({"loop": {"steps": True}}, "loop.steps", "integer"),
        ({"loop": {"steps": 1.5}}, "loop.steps", "integer"),
        ({"loop": {"steps": 0}}, "loop.steps", "greater than 0"),
        ({"loop": {"steps": 5, "epochs": 1}}, "loop", "exactly one of steps and epochs"),
        ({"loop": {}}, "loop", "exactly one of steps and epochs"),
        ({"loop": {"epochs": float("nan")}}, "loop.epochs", "greater than 0"),
        ({"data": {"pairs": "p", "flip": 1}}, "data.flip", "boolean"),
        ({"data": {"pairs": "p", "flip": "yes"}}, "data.flip", "boolean"),
        ({"data": {}}, "data.pairs", "is missing"),
        ({"data": None}, "data", "object"),
        ({"deepspeed": [1]}, "deepspeed", "object"),
        ({"seed": -1}, "seed", "greater than or equal"),
        ({"seed": 2**32}, "seed", "less than"),
        ({"resume": "maybe"}, "resume", "auto"),
        ({"stage": "vqgna"}, "stage", "vqgan"),
        ({"model": {"image_size": 100}}, "model", "divisible"),
        ({"model": {"base_channels": 48}}, "model", "base_channels 48"),
        ({"stage": "kodalle"}, "vqgan", "is missing"),
    ],
)
def test_fault_names_field_value_and_file(write: Write, changes: dict[str, Any], field: str, message: str) -> None:
    error = _fault(write(**changes))
    assert error.field == field
    assert message in error.remedy


def test_missing_stage_is_named_without_the_whole_file(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("stage: vqgan\n", ""))
    error = _fault(path)
    assert (error.field, error.value) == ("stage", "(nothing)")


@pytest.mark.parametrize("text", ["None", "none", "NONE"])
def test_text_none_is_rejected_everywhere(write: Write, text: str) -> None:
    assert _fault(write(data={"pairs": "p", "balance": text})).field == "data.balance"
    assert _fault(write(), f"loss.perceptual_weights={text}").field == "loss.perceptual_weights"
    assert _fault(write(model={"channel_multipliers": [1, text]})).field == "model.channel_multipliers.1"


def test_no_perceptual_loss_is_called_none(write: Write) -> None:
    run = load_run(write(), ["loss.perceptual=none"])
    assert isinstance(run, VqganRun)
    assert run.loss.perceptual == "none"
    assert _fault(write(), "loss.perceptual=None").field == "loss.perceptual"


def test_deepspeed_keeps_its_own_word_none(write: Write) -> None:
    settings = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert load_run(write(deepspeed=settings)).deepspeed == settings
    assert _fault(write(deepspeed={"scheduler": "None"})).field == "deepspeed.scheduler"


def test_augmented_views_and_their_shift_go_together(write: Write) -> None:
    kodalle = {"stage": "kodalle", "vqgan": "v"}
    for half in ({"augmented_views": 4}, {"augment_shift": 2}):
        assert "go together" in str(_fault(write(**kodalle, **half)))
    assert load_run(write(**kodalle, augmented_views=4, augment_shift=2)).augmented_views == 4  # type: ignore[union-attr]


def test_null_means_nothing(write: Write) -> None:
    assert load_run(write(data={"pairs": "p", "balance": "x"}), ["data.balance=null"]).data.balance is None


def test_key_given_twice(write: Write) -> None:
    path = write()
    path.write_text(path.read_text() + "seed: 1\nseed: 2\n")
    assert "key given twice: seed" in str(_fault(path))
    path.write_text("loop: {steps: 1, steps: 2}\n")
    assert "key given twice: steps" in str(_fault(path))


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "+1e-06", "1.0e-6", ".1e-5", "1.e-6"])
def test_scientific_notation_is_a_number(write: Write, text: str) -> None:
    run = load_run(write(), [f"deepspeed.optimizer.params.lr={text}"])
    assert run.deepspeed["optimizer"]["params"]["lr"] == 1e-6


def test_override_wins_over_file_and_file_over_default(write: Write) -> None:
    assert load_run(write()).seed == 42
    path = write(seed=7)
    assert load_run(path).seed == 7
    overridden = load_run(path, ["seed=8", "seed=9", "loop.steps=100", "model.channel_multipliers=[1, 2]"])
    assert overridden == load_run(write(seed=9, loop={"steps": 100}, model={"channel_multipliers": [1, 2]}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("seed.deeper=3", "is a value, not a section"),
        ("seed=[1", "not valid YAML"),
        ("loop.stesp=3", "unknown key"),
    ],
)
def test_bad_override(write: Write, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_run(write(seed=1), [override])


def test_options_that_do_not_go_together_are_named_without_the_whole_config() -> None:
    with pytest.raises(InputError) as caught:
        load_run(REPOSITORY / "configs/clothing/kodalle.yaml", ["augmented_views=0"])
    assert str(caught.value).startswith("config: (several options): augmented_views 0 and augment_shift 4 go together")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- a\n- b\n", "key: value"),
        (b"", "key: value"),
        (b"a: \xff\n", "not valid YAML"),
        (b"? [a]\n: 1\n", "not valid YAML"),
        (b"when: 2026-01-01\n", "stage"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert message in str(_fault(path))


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in str(_fault(tmp_path / "none.yaml"))


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "stage: vqgan\nrun: r\ndata: {pairs: p}\nloop: {steps: 1}\n"
        "deepspeed:\n  optimizer: &adam {type: AdamW}\n  again: {<<: *adam, lr: 1}\n"
    )
    assert load_run(path).deepspeed["again"] == {"type": "AdamW", "lr": 1}


def test_parse_section_of_a_model_folder() -> None:
    config = VqganConfig(image_size=32, channel_multipliers=(1, 1))
    assert parse_section(VqganConfig, config.model_dump(mode="json"), source="config.json") == config
    with pytest.raises(InputError, match=r"image_size: '32': .*, in config.json"):
        parse_section(VqganConfig, {"image_size": "32"}, source="config.json")


def test_entry_point_prints_one_line_and_exits_2(write: Write, tmp_path: Path) -> None:
    path = write()
    answer = subprocess.run(
        [sys.executable, "engine/train.py", "--config", str(path), "seed=1", "loop.steps=None"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=120,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines() == [
        f"error: loop.steps: 'None': is a text, not 'nothing' (in {path} with the command line's key=value): "
        "write null, or remove the line"
    ]


def test_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = REPOSITORY / "configs" / "demo" / "kodalle.yaml"
    run = load_run(file, ["run=~/x", "data.pairs=~/pairs", "text.tokenizer=~/words"])
    assert isinstance(run, KodalleRun)
    assert (run.run, run.data.pairs) == (tmp_path / "x", tmp_path / "pairs")
    assert run.text.tokenizer == str(tmp_path / "words")
    with pytest.raises(InputError, match=r"^run: '~no-such-user/x': "):
        load_run(file, ["run=~no-such-user/x"])
