"""Muon and weight decay on matrices, and whole trainings with every option for small data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.errors import InputError
from engine.models.folder import load_part
from engine.models.transformer import KoDalle
from engine.training.engines import make_engine
from engine.training.muon import check_muon, make_muon
from engine.training.parameter_groups import decayed_groups, parameter_kinds
from engine.training.process_group import free_port, join_world
from engine.training.update_guard import UpdateGuard
from engine.training.weights import full_weights
from tests.engine.training.test_ranks import train_as_rank
from tests.engine.training.test_resuming import stop_after
from tests.engine.training.test_trainer import PRELOAD
from tests.forked import run_forked

Tree = dict[str, Any]
TINY = TransformerConfig(
    dim=24, num_layers=2, num_heads=2, head_dim=8, text_vocab_size=20, text_seq_len=5, text_position_rows=9,
    image_vocab_size=13, image_grid_size=3,
)  # fmt: skip
OPTIONS = {"qk_norm": True, "zero_init_branches": True, "x0_scalars": True, "target_positions": True}
MUON: Tree = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 1.0e-3, "weight_decay": 0.1, "betas": [0.9, 0.98]}}


# ------------------------------------------------------------------------------------------------- matrices and others


def test_matrices_are_the_weights_of_linear_layers_and_nothing_else() -> None:
    model = KoDalle(TINY.model_copy(update=OPTIONS))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = ({names[id(parameter)] for parameter in kind} for kind in parameter_kinds(model))
    ends = ("attention.qkv", "attention.out", "feed_forward.grow", "feed_forward.shrink")
    assert matrices == {f"layers.{i}.{end}.weight" for i in range(2) for end in ends}
    assert {"head.weight", "text_embedding.tokens", "target_embedding.rows", "layers.0.x0_scalars"} <= others
    assert matrices | others == set(names.values())
    assert not matrices & others


def _settings(zero: int, *, bf16: bool = False, optimizer: Tree | None = None) -> Tree:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": optimizer or {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bf16},
    }


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.tensor([[0, 7, 8, 2, 1], [0, 19, 2, 1, 1]]), torch.randint(0, 13, (2, 9), generator=generator)


def _updates(zero: int, *, bf16: bool, optimizer: Tree, decay_others: bool, steps: int = 1) -> dict[str, Tensor]:
    """What training steps added to each parameter."""
    join_world(torch_threads=1)
    torch.manual_seed(0)
    model = KoDalle(TINY, embedding_std=0.5)
    kinds = parameter_kinds(model)
    made = make_muon(*kinds, optimizer["params"], decay_others=decay_others) if optimizer["type"] == "Muon" else None
    engine = make_engine(
        model, _settings(zero, bf16=bf16, optimizer=optimizer), total_steps=9, optimizer=made,
        parameters=None if decay_others else decayed_groups(kinds),
    )  # fmt: skip
    before = full_weights(engine)
    for _ in range(steps):
        engine.backward(engine(*_inputs()).loss)
        engine.step()
    after = full_weights(engine)
    return {name: after[name] - before[name] for name in before}


@pytest.mark.slow
def test_decay_on_matrices_leaves_the_others_where_their_gradients_put_them() -> None:
    def adamw(decay: float) -> Tree:
        return {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": decay, "torch_adam": True}}

    everywhere = _updates(0, bf16=False, optimizer=adamw(0.5), decay_others=True)
    on_matrices = _updates(0, bf16=False, optimizer=adamw(0.5), decay_others=False)
    nowhere = _updates(0, bf16=False, optimizer=adamw(0.0), decay_others=True)
    for name, update in on_matrices.items():
        is_matrix = name.startswith("layers.") and update.dim() == 2
        assert torch.equal(update, (everywhere if is_matrix else nowhere)[name]), name
    assert not torch.equal(everywhere["image_embedding.tokens"], nowhere["image_embedding.tokens"])
    assert not torch.equal(everywhere["layers.0.attention.qkv.weight"], nowhere["layers.0.attention.qkv.weight"])


# ---------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_muon_moves_matrices_alike_in_all_directions_and_the_others_as_adamw(zero: int, bf16: bool) -> None:
    rate, adam_rate = 0.02, 1e-3
    muon: Tree = {"type": "Muon", "params": {"lr": rate, "adam_lr": adam_rate, "betas": [0.9, 0.98], "eps": 1e-8}}
    updates = _updates(zero, bf16=bf16, optimizer=muon, decay_others=True)
    adamw: Tree = {
        "type": "AdamW",
        "params": {"lr": adam_rate, "betas": [0.9, 0.98], "weight_decay": 0.0, "torch_adam": True},
    }
    expected = _updates(zero, bf16=bf16, optimizer=adamw, decay_others=True)
    for name, update in updates.items():
        if name.startswith("layers.") and update.dim() == 2:
            rows, columns = update.shape
            values = torch.linalg.svdvals(update.double()) / (rate * max(1, rows / columns) ** 0.5)
            # Newton-Schulz of five steps leaves singular values of about 0.7 to 1.2, and the smallest ones below.
            assert values.max() < 1.4, name
            assert values.median() > 0.5, name
        else:
            torch.testing.assert_close(update, expected[name], rtol=0, atol=2e-3 if bf16 else 1e-6, msg=name)
            assert update.abs().max() < 3 * adam_rate, name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_muon_is_the_same_sharded(zero: int) -> None:
    plain = _updates(0, bf16=False, optimizer=MUON, decay_others=False, steps=4)
    sharded = _updates(zero, bf16=False, optimizer=MUON, decay_others=False, steps=4)
    for name, update in plain.items():
        torch.testing.assert_close(sharded[name], update, rtol=0, atol=2e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_gradient_that_is_not_finite_never_reaches_weights_or_momentum(zero: int, bf16: bool) -> None:
    world = join_world(torch_threads=1)
    torch.manual_seed(0)
    model = KoDalle(TINY, embedding_std=0.5)
    made = make_muon(*parameter_kinds(model), MUON["params"], decay_others=False)
    engine = make_engine(model, _settings(zero, bf16=bf16, optimizer=MUON), total_steps=9, optimizer=made)
    guard = UpdateGuard(world, fp16=False)
    guard.watch(engine)

    def step(number: int, factor: float) -> None:
        guard.start_step(number)
        loss = engine(*_inputs()).loss
        loss.register_hook(lambda gradient: gradient * factor)
        guard.backward_and_step(engine, loss)

    step(1, 1.0)
    before = full_weights(engine)
    with pytest.raises(InputError, match="step 2: grad_norm nan"):
        step(2, torch.nan)
    after = full_weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    momenta = [state["momentum_buffer"] for state in made.state.values() if "momentum_buffer" in state]
    assert momenta
    assert all(bool(momentum.isfinite().all()) for momentum in momenta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "write 0, 1 or 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "leave it out"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "bf16 and float32 only"),
        ({"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}, "would clip Muon's updates"),
        ({"scheduler": {"type": "WarmupLR"}}, "use WarmupCosineLR"),
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "adam_lr"),
        ({"optimizer": {"type": "muon", "params": {"adam_lr": 0.02, "lr": "fast"}}}, "positive number"),
        ({"optimizer": {"type": "Muon", "params": MUON["params"] | {"moment": 0.9}}}, "Muon has momentum"),
    ],
)
def test_what_muon_cannot_do_is_refused_in_a_line(change: Tree, message: str) -> None:
    good = {"optimizer": MUON, "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}}
    check_muon(good)
    with pytest.raises(InputError, match=r"nothing, which is 1\.0"):  # DeepSpeed's default since 0.19
        check_muon({"optimizer": MUON, "zero_optimization": {"stage": 1}})
    check_muon(good | {"gradient_clipping": 0, "zero_optimization": {"stage": 2}})
    with pytest.raises(InputError, match=message) as raised:
        check_muon(good | change)
    assert "\n" not in str(raised.value)


def test_a_value_that_deepspeed_rejects_is_named() -> None:
    with pytest.raises(InputError, match="ns_method"):
        make_muon(*parameter_kinds(KoDalle(TINY)), MUON["params"] | {"ns_method": "exact"}, decay_others=True)


def test_other_stages_have_no_muon() -> None:
    with pytest.raises(InputError, match="stage: kodalle"):
        make_engine(torch.nn.Linear(2, 2), _settings(0, optimizer=MUON), total_steps=1)


# ---------------------------------------------------------------------------------------------------------- whole runs


def _optioned(tree: Tree, zero: int) -> Tree:
    """A run with every option; half of its steps are in random orders."""
    tree["model"] |= OPTIONS
    tree |= {"order_annealing": {"start": 0.25, "end": 0.75}, "weight_decay_on": "matrices"}
    tree["deepspeed"] |= {"optimizer": MUON, "zero_optimization": {"stage": zero}}
    if zero:
        tree["deepspeed"]["gradient_clipping"] = 0.0
    return tree


@pytest.mark.exclusive  # bits are compared: no thread of another test's server may run beside
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_run_with_every_option_learns_and_resumes_to_the_same_bits(
    zero: int,
    tree_of: Callable[..., Tree],
    train_tree: Callable[[Tree], Path],
    losses: Callable[[Path], list[Tree]],
    same_weights: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_tree(_optioned(tree_of("kodalle", tmp_path / "whole"), zero))
    with monkeypatch.context() as patched:
        stop_after(patched, "kodalle", 3)
        with pytest.raises(SystemExit, match="143"):
            train_tree(_optioned(tree_of("kodalle", tmp_path / "run"), zero))
    torch.manual_seed(99)
    train_tree(_optioned(tree_of("kodalle", tmp_path / "run"), zero))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")
    validation = [line["validation_loss"] for line in losses(tmp_path / "run") if "validation_loss" in line]
    assert validation[-1] < validation[0]
    model: KoDalle = load_part(tmp_path / "run" / "model", "transformer")
    assert all(getattr(model.config, name) for name in OPTIONS)
    assert not torch.equal(model.get_parameter("layers.1.x0_scalars"), torch.tensor([1.0, 0.0]))


def _exact(tree: Tree, zero: int, *, batch_size: int) -> Tree:
    """Every option, without dropout, which depends on the grouping of images; in an AdamW that is insensitive to rounding."""
    tree = _optioned(tree, zero)
    tree["model"] |= {"attention_dropout": 0.0, "ff_dropout": 0.0}
    muon = MUON | {"params": MUON["params"] | {"eps": 1e-3}}
    tree["deepspeed"] |= {"train_micro_batch_size_per_gpu": batch_size, "optimizer": muon, "gradient_clipping": 0.0}
    tree["loop"] |= {"steps": 4, "validate_every": 4, "sample_every": 4, "checkpoint_every": 4}
    return tree


def test_two_ranks_equal_one_with_twice_the_batch(
    tree_of: Callable[..., Tree],
    train_tree: Callable[[Tree], Path],
    write_tree: Callable[[Tree, Path], Path],
    losses: Callable[[Path], list[Tree]],
    tmp_path: Path,
) -> None:
    """ZeRO 1 and 2 cut matrices in two, and DeepSpeed puts them together for Newton-Schulz."""
    whole = load_file(
        train_tree(_exact(tree_of("kodalle", tmp_path / "one"), 0, batch_size=4)) / "transformer.safetensors"
    )
    files = [
        write_tree(_exact(tree_of("kodalle", tmp_path / f"zero{zero}"), zero, batch_size=2), tmp_path / f"{zero}.yaml")
        for zero in range(3)
    ]
    port = free_port()
    answers = run_forked([(train_as_rank, (rank, 2, port, files)) for rank in range(2)], tmp_path, preload=PRELOAD)
    assert [code for code, _ in answers] == [0, 0], answers
    for zero in range(3):
        run = tmp_path / f"zero{zero}"
        weights = load_file(run / "model" / "transformer.safetensors")
        for name, expected in whole.items():
            # Newton-Schulz runs in 16 bits where a processor has them, so that the last bits of gradients matter more.
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=5e-4, msg=f"{name}, ZeRO {zero}")
        logged = [[line["loss"] for line in losses(folder) if "loss" in line] for folder in (run, tmp_path / "one")]
        assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_orders_without_target_positions_are_refused(
    tree_of: Callable[..., Tree], train_tree: Callable[[Tree], Path], tmp_path: Path
) -> None:
    tree = _optioned(tree_of("kodalle", tmp_path / "run"), 0)
    tree["model"] |= {"target_positions": False}
    with pytest.raises(InputError, match="target_positions: true"):
        train_tree(tree)
    tree["model"] |= {"target_positions": True}
    with pytest.raises(InputError, match="before start"):
        train_tree(tree | {"order_annealing": {"start": 0.5, "end": 0.2}})
