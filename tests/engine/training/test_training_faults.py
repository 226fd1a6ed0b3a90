"""What a user can get wrong about a new run is one line that names it, before the first step where possible."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import InputError
from engine.training.checkpoints import complete_checkpoints
from engine.training.plan.configs import FP16
from engine.training.process_group import World
from engine.training.update_guard import UpdateGuard
from tests.engine.training.config_trees import Tree, with_value

Train = Callable[[Tree], Path]
TreeOf = Callable[..., Tree]


def _rejected(train: Train, tree: Tree, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(tree)
    assert "\n" not in str(caught.value)
    assert not complete_checkpoints(Path(tree["run"]) / "checkpoints")


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", None, r"micro_batch_size_per_gpu: \(nothing\): give"),
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", "auto", r"micro_batch_size_per_gpu: auto: give"),
        ("koclip", "deepspeed.train_micro_batch_size_per_gpu", 0, r"micro_batch_size_per_gpu: 0: give"),
        ("koclip", "deepspeed.gradient_accumulation_steps", 1.5, r"gradient_accumulation_steps: 1.5: give"),
        ("koclip", "deepspeed.optimizer", None, r"deepspeed.optimizer: \(nothing\): is missing"),
        ("koclip", "deepspeed.optimizer.type", "Addam", r"deepspeed\.optimizer\.type: Addam"),
        ("koclip", "deepspeed.optimizer.params.learning_rate", 1.0, r"deepspeed: .*learning_rate"),
        ("kodalle", "deepspeed.scheduler.type", "Sometimes", r"deepspeed: .*Sometimes"),
        ("koclip", "deepspeed.zero_optimization.stage", 7, r"deepspeed: .*(7|stage)"),
        (
            "kodalle",
            "deepspeed.gradient_clipping",
            None,
            r"deepspeed.gradient_clipping: \(nothing\): .*changes the arith",
        ),
        ("kodalle", "deepspeed.fp16", FP16, r"zero_optimization.stage: 0: DeepSpeed scales no fp16 loss at"),
        ("koclip", "deepspeed.fp16", FP16, "deepspeed.fp16.enabled: True: DeepSpeed has no fp16 on CPU"),
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
        ("kodalle", "model.image_vocab_size", 64, "model.image_vocab_size: 64: the codec in .* has 32 codes"),
        ("kodalle", "model.image_grid_size", 4, "model.image_grid_size: 4: the codec in .* makes 8 tokens a side"),
        ("kodalle", "model.text_vocab_size", 20, r"model.text_vocab_size: 20: the tokenizer has \d+ entries"),
        ("kodalle", "text.tokenizer", "train", "this KoCLIP was trained with another tokenizer: write text.tokenizer="),
        ("kodalle", "pretrained_text_embeddings", "./nowhere", "pretrained_text_embeddings: ./nowhere"),
    ],
)
def test_rejected_before_the_first_step(
    stage: str, key: str, value: Any, message: str, tree_of: TreeOf, train_tree: Train, tmp_path: Path
) -> None:
    tree = with_value(tree_of(stage, tmp_path / "run"), key, value)
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
        with_value(tree, "model.codebook_size", 64),
        r"start_from: .*has other sizes \(model.codebook_size is 64, there 32\)",
    )


@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (1, False), (0, True)])
def test_decoder_alone_keeps_every_token(
    vqgan_run: Path, tree_of: TreeOf, train_tree: Train, tmp_path: Path, zero_stage: int, bf16: bool
) -> None:
    """Encoder and codebook are the same bits afterwards, and the decoder learnt, discriminator included."""
    tree = tree_of("vqgan", tmp_path / "run", start_from=str(vqgan_run / "model"), codebook_reset={}, decoder_only=True)
    tree["deepspeed"] |= {"zero_optimization": {"stage": zero_stage}, "bf16": {"enabled": bf16}}
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
