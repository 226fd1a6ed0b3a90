"""What a user can get wrong about a run is one line that names it, before the first step where possible."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from engine.config_files import load_run
from engine.errors import InputError
from engine.files import file_digest
from engine.training.checkpoints import complete_checkpoints, newest_marker, write_marker
from engine.training.process_group import World, join_world
from engine.training.stage_kodalle import KodalleStage
from engine.training.update_guard import UpdateGuard
from tests.paths import REPOSITORY

Tree = dict[str, Any]
Train = Callable[[Tree], Path]
TreeOf = Callable[..., Tree]


def _set(tree: Tree, key: str, value: Any) -> Tree:
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        section[parent] = dict(section.get(parent, {}))
        section = section[parent]
    if value is None:
        section.pop(last)
    else:
        section[last] = value
    return tree


def _rejected(train: Train, tree: Tree, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(tree)
    assert "\n" not in str(caught.value)
    assert not complete_checkpoints(Path(tree["run"]) / "checkpoints")


# ---------------------------------------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", None, r"micro_batch_size_per_gpu: \(nothing\): give"),
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", "auto", r"micro_batch_size_per_gpu: auto: give"),
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", 0, r"micro_batch_size_per_gpu: 0: give"),
        ("koclip", "deepspeed.gradient_accumulation_steps", 1.5, r"gradient_accumulation_steps: 1.5: give"),
        ("koclip", "deepspeed.optimizer", None, r"deepspeed.optimizer: \(nothing\): is missing"),
        ("koclip", "deepspeed.optimizer.type", "Addam", r"deepspeed: .*Addam"),
        ("koclip", "deepspeed.optimizer.params.learning_rate", 1.0, r"deepspeed: .*learning_rate"),
        ("kodalle", "deepspeed.scheduler.type", "Sometimes", r"deepspeed: .*Sometimes"),
        ("koclip", "deepspeed.zero_optimization.stage", 7, r"deepspeed: .*(7|stage)"),
        ("kodalle", "deepspeed.fp16.enabled", True, r"zero_optimization.stage: 0: DeepSpeed scales no fp16 loss at"),
        ("koclip", "deepspeed.fp16.enabled", True, "deepspeed.fp16.enabled: True: DeepSpeed has no fp16 on CPU"),
        ("koclip", "deepspeed.train_batch_size", 77, r"deepspeed: .*batch"),
        ("koclip", "deepspeed.scheduler.type", "WarmupDecayLR", "encoder_lr_ratio: 0.8: .*one rate"),
        ("koclip", "model.text_vocab_size", 20, r"model.text_vocab_size: 20: the tokenizer has \d+ entries: raise it"),
        ("koclip", "text.tokenizer", "nowhere/at-all", r"text.tokenizer: nowhere/at-all: cannot be loaded"),
        ("koclip", "data.pairs", "nowhere", "pairs: nowhere: no such folder"),
        ("koclip", "data.balance", "sleeve", "balance: sleeve: no pair has this attribute; known are: ground"),
        ("koclip", "model.image_hidden_dim", 64, "image_hidden_dim: 64: .*write image_hidden_dim: 128"),
        ("vqgan", "deepspeed.zero_optimization.stage", 3, "zero_optimization.stage: 3: .*use 0, 1 or 2"),
        ("vqgan", "loss.perceptual", "lpips", r"perceptual_weights: \(nothing\)"),
        ("vqgan", "loss.perceptual_weight", 0, "loss.perceptual_weight: 0: .*greater than 0"),
        ("kodalle", "vqgan", "nowhere", "nowhere: no such (model )?folder"),
        ("kodalle", "koclip", "nowhere", "nowhere: no such (model )?folder"),
        ("kodalle", "model.image_vocab_size", 64, "model.image_vocab_size: 64: the VQGAN in .* has 32 codes"),
        ("kodalle", "model.image_grid_size", 4, "model.image_grid_size: 4: the VQGAN in .* makes 8 tokens a side"),
        ("kodalle", "model.text_vocab_size", 20, r"model.text_vocab_size: 20: the tokenizer has \d+ entries"),
        ("kodalle", "text.tokenizer", "train", "this KoCLIP was trained with another tokenizer: write text.tokenizer="),
        ("kodalle", "pretrained_text_embeddings", "./nowhere", "pretrained_text_embeddings: ./nowhere"),
    ],
)
def test_rejected_before_the_first_step(
    stage: str, key: str, value: Any, message: str, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = _set(tree_of(stage, tmp_path / "run"), key, value)
    if key == "text.tokenizer" and stage == "kodalle":
        tree["text"]["vocab_size"] = 20
    _rejected(train_tree, tree, message)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_koclip_folder_without_a_koclip_is_rejected_before_training(
    vqgan_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = tree_of("kodalle", tmp_path / "run", koclip=str(vqgan_run / "model"))
    _rejected(train_tree, tree, r"has no koclip \(it holds: vqgan\)")


def test_start_from_another_size(vqgan_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path) -> None:
    tree = tree_of("vqgan", tmp_path / "run", start_from=str(vqgan_run / "model"))
    _rejected(
        train_tree,
        _set(tree, "model.codebook_size", 64),
        r"start_from: .*has other sizes \(model.codebook_size is 64, there 32\)",
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_decoder_alone_keeps_every_token(
    vqgan_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path, zero_stage: int
) -> None:
    """Encoder and codebook are the same bits afterwards, and the decoder learnt, discriminator included."""
    tree = tree_of("vqgan", tmp_path / "run", start_from=str(vqgan_run / "model"), codebook_reset={}, decoder_only=True)
    tree["deepspeed"]["zero_optimization"] = {"stage": zero_stage}
    old, new = (load_file(folder / "vqgan.safetensors") for folder in (vqgan_run / "model", train_tree(tree)))
    assert old.keys() == new.keys()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"decoder_only": False, "loss": {"perceptual": "efficientnet-lite0", "perceptual_shift": 8}}, "windows of 24 pixels"),
     ({"codebook_reset": {}}, "decoder_only: needs a trained .*: give start_from"),
     ({"start_from": "x", "codebook_reset": {"reset_every": 5}}, "decoder_only: codebook_reset would change")],
)  # fmt: skip
def test_vqgan_options_that_do_not_fit_are_refused(
    tree_of: TreeOf, train_tree: Train, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _rejected(train_tree, tree_of("vqgan", tmp_path / "run", **({"decoder_only": True} | changes)), message)


def test_unreadable_image_is_named(
    pairs_folder: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    broken = tmp_path / "pairs" / "images" / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])
    tree = tree_of("kodalle", tmp_path / "run")
    tree["data"]["pairs"] = str(tmp_path / "pairs")
    _rejected(train_tree, tree, r"05\.png")
    assert not (tmp_path / "run" / "shards").exists()


def test_misspelt_deepspeed_key_is_rejected_before_anything_is_written(
    tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = tree_of("kodalle", tmp_path / "run")
    tree["deepspeed"]["gradient_cliping"] = 0.5
    _rejected(train_tree, tree, r"deepspeed.gradient_cliping: 0.5: .*did you mean gradient_clipping")
    assert not (tmp_path / "run").exists()


def test_a_loss_scale_that_can_fall_no_further_is_one_line() -> None:
    class Engine:
        module = torch.nn.Linear(1, 1)
        optimizer = type("Wrapped", (), {"_global_grad_norm": 0.0})()
        basic_optimizer = torch.optim.SGD(module.parameters())

        def __init__(self, words: str) -> None:
            self.words = words

        def backward(self, loss: torch.Tensor) -> None: ...

        def is_gradient_accumulation_boundary(self) -> bool:
            return True

        def step(self) -> None:
            raise Exception(self.words)

    def step(words: str) -> None:
        engine: Any = Engine(words)
        guard = UpdateGuard(World(0, 1, 0, torch.device("cpu")), fp16=True)
        guard.watch(engine)
        guard.backward_and_step(engine, torch.zeros((), dtype=torch.float32))

    # as deepspeed/runtime/fp16/loss_scaler.py has it
    with pytest.raises(
        InputError, match=r"deepspeed.fp16: the loss scale is at its minimum: .*lower the learning rate"
    ):
        step("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    with pytest.raises(Exception, match="another"):
        step("another")


# ------------------------------------------------------------------------------------------------------ on resumption


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
        train_tree(_set(tree_of("kodalle", started), key, value))
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
    shard = started / "shards" / "train" / "image_tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    tree = tree_of("kodalle", started)
    tree["data"]["pairs"] = str(own_pairs)
    train_tree(tree)
    assert "are damaged: train/image_tokens.npy has other bytes than were written: they are" in capsys.readouterr().out
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
    code = "import sys; from pathlib import Path; from engine.training.run_lock import hold_lock\n"
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


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("zero", [0, 1])
def test_exploding_numbers_stop_the_run_and_are_not_saved(
    zero: int, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = tree_of("kodalle", tmp_path / "run")
    tree["deepspeed"] |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": zero}}
    tree["deepspeed"]["optimizer"] = {"type": "AdamW", "params": {"lr": 1e30, "torch_adam": True}}
    del tree["deepspeed"]["scheduler"]
    tree["loop"] |= {"checkpoint_every": 1}
    with pytest.raises(InputError, match=r"training: step \d+: .*(nan|inf|finite).*: lower the learning rate"):
        train_tree(tree)
    for checkpoint in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        states = torch.load(checkpoint / "kodalle" / "state" / "mp_rank_00_model_states.pt", weights_only=False)
        assert all(torch.isfinite(value).all() for value in states["module"].values())
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert lines  # what led there can be read


# ---------------------------------------------------------------------------------------------------------- the shards


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
            _set(tree, key.replace("__", "."), value)
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
    assert "encoding images" in make_stage(vqgan=str(other))


def test_cut_captions_are_reported_or_rejected(make_stage: Callable[..., str], tmp_path: Path) -> None:
    message = make_stage(model__text_seq_len=4)
    assert "note: the captions of 30 images are too long and were cut" in message
    with pytest.raises(InputError, match="strict_captions: True: 30 images have captions of more"):
        make_stage(model__text_seq_len=4, strict_captions=True)
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(InputError, match=r"caption: .* more than the model's 4"):
        make_stage(model__text_seq_len=4, strict_captions=True)
