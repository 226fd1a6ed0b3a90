"""Per-resblock gradient scaling in fp16 on a CPU, without DeepSpeed, which has no fp16 there; overflows are put in by hand."""

import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from engine.config.transformer import TransformerConfig
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.training.process_group import World
from engine.training.resblock_scaling import ResblockScaling, make_resblock_scaling

CONFIG = TransformerConfig(
    dim=32, num_layers=3, num_heads=2, head_dim=16, text_vocab_size=40, text_seq_len=6, text_position_rows=8, image_vocab_size=20,
    image_grid_size=3,
)  # fmt: skip
ALONE = World(0, 1, 0, torch.device("cpu"))


def _model() -> KoDalle:
    torch.manual_seed(0)
    return KoDalle(CONFIG, embedding_std=0.02)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 40, (4, 6), generator=generator), torch.randint(20, (4, 9), generator=generator)


def _gradients(model: KoDalle, *, times: float = 1.0) -> dict[str, torch.Tensor]:
    """Of the loss times a number."""
    (model(*_batch()).loss * times).backward()
    return {name: p.grad.float() / times for name, p in model.named_parameters() if p.grad is not None}


def _error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-12)) for name in exact}


def test_small_gradients_survive_that_underflow_without_it() -> None:
    """Branches with a scale of 1e-5, as layers 19 to 24 of the published model start: in fp16 a quarter of their gradients is lost."""

    def deep() -> KoDalle:
        model = _model()
        for layer in model.layers:
            for branch in (layer.attention, layer.feed_forward):
                torch.nn.init.constant_(branch.scale, 1e-5)  # type: ignore[arg-type, union-attr]
        return model

    exact = _gradients(deep())
    lost = _error(_gradients(deep().half()), exact)
    scaled = deep().half()
    ResblockScaling(scaled, ALONE).scales[:] = 2.0**15
    kept = _error(_gradients(scaled), exact)
    weights = [name for name in exact if name.endswith(("qkv.weight", "grow.weight"))]
    assert len(weights) == 6
    for name in weights:
        assert lost[name] > 0.15, (name, lost[name])
        assert kept[name] < lost[name] / 4, (name, kept[name], lost[name])


def test_a_static_loss_scale_is_divided_out() -> None:
    exact = _gradients(_model())
    scaled = _model().half()
    ResblockScaling(scaled, ALONE, loss_scale=1024.0)
    found = _error(_gradients(scaled, times=1024.0), exact)
    assert max(found.values()) < 0.02, max(found.items(), key=lambda item: item[1])


def test_without_gradients_the_model_computes_the_same() -> None:
    plain, scaled = _model().half(), _model().half()
    ResblockScaling(scaled, ALONE)
    with torch.no_grad():
        assert abs(float(plain(*_batch()).loss) - float(scaled(*_batch()).loss)) < 2e-3
    assert abs(float(plain(*_batch()).loss) - float(scaled(*_batch()).loss)) < 2e-3


def test_an_overflow_is_kept_in_its_branch_and_halves_its_scale_alone() -> None:
    model = _model().half()
    scaling = ResblockScaling(model, ALONE)

    def overflow(module: nn.Module, inputs: Any, outputs: Any) -> tuple[torch.Tensor]:
        return (torch.full_like(inputs[0], math.inf),)

    handle = cast(Layer, model.layers[1]).feed_forward.shrink.register_full_backward_hook(overflow)
    found = _gradients(model)
    handle.remove()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert float(found["layers.1.feed_forward.grow.weight"].abs().max()) == 0
    assert float(found["layers.1.attention.qkv.weight"].abs().max()) > 0  # by the identity path
    scaling.after_step(1)
    start = 2.0**13
    expected = [start * 2 ** (1 / 1000)] * 6
    expected[3] = start / math.sqrt(2)
    assert scaling.scales.tolist() == pytest.approx(expected)


def test_a_scale_is_divided_once_in_125_steps_and_stays_in_its_bounds() -> None:
    scaling = ResblockScaling(_model(), ALONE)

    def step(number: int, *, bad: bool) -> float:
        scaling.found_bad[0] = float(bad)
        scaling.after_step(number)
        return float(scaling.scales[0])

    first = step(1, bad=True)
    assert [step(number, bad=True) for number in range(2, 126)] == [first] * 124
    assert step(126, bad=True) == pytest.approx(first / math.sqrt(2))
    for number in range(127, 20_000, 125):
        step(number, bad=True)
    assert float(scaling.scales[0]) == 2.0**7
    scaling.scales[:] = 2.0**24
    assert step(20_001, bad=False) == 2.0**24


def test_state_comes_back() -> None:
    ours, theirs = ResblockScaling(_model(), ALONE), ResblockScaling(_model(), ALONE)
    ours.found_bad[2] = 1
    ours.after_step(7)
    theirs.load_state(ours.state())
    assert torch.equal(ours.scales, theirs.scales)
    assert torch.equal(ours.divided_at, theirs.divided_at)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bf16": {"enabled": True}}, "resblock_gradient_scaling: True: is for deepspeed.fp16"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.loss_scale: 0.0: .*write 1024"),
    ],
)
def test_what_it_is_not_for(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_resblock_scaling(_model(), settings, ALONE)
