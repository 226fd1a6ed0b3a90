"""Options of the transformer for small models: what each computes, where it starts, and that off means off."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.models.attention import QK_GAIN, normalised_heads
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer

CONFIG = TransformerConfig(
    dim=24, num_layers=3, num_heads=2, head_dim=8, text_vocab_size=20, text_seq_len=5, text_position_rows=9,
    image_vocab_size=13, image_grid_size=3,
)  # fmt: skip
N = CONFIG.image_seq_len
TEXT = torch.tensor([[0, 7, 8, 2, 1], [0, 19, 2, 1, 1]])
ALL = {"qk_norm": True, "zero_init_branches": True, "x0_scalars": True, "target_positions": True}


def _model(**options: bool) -> KoDalle:
    torch.manual_seed(0)
    return KoDalle(CONFIG.model_copy(update=options)).eval()


def _trained(**options: bool) -> KoDalle:
    """All parameters away from their first values."""
    model = _model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _layers(model: KoDalle) -> list[Layer]:
    return cast(list[Layer], list(model.layers))


def _image() -> Tensor:
    return torch.randint(0, CONFIG.image_vocab_size, (2, N), generator=torch.Generator().manual_seed(1))


def test_off_leaves_no_trace() -> None:
    """Also in the stream of random numbers: a run of before gets the same weights."""
    model, optioned = _model(), _model(**ALL)
    added = {"target_embedding.rows", "target_embedding.columns", *(f"layers.{i}.x0_scalars" for i in range(3))}
    assert optioned.state_dict().keys() - model.state_dict().keys() == added
    assert model.target_embedding is None
    for name in ("layers.2.feed_forward.grow.weight", "head.weight"):
        assert torch.equal(model.get_parameter(name), optioned.get_parameter(name)), name


def test_every_parameter_of_every_option_learns() -> None:
    model = _trained(**ALL)
    orders = torch.stack([torch.randperm(N), torch.randperm(N)])
    model(TEXT, _image(), orders=orders).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# ------------------------------------------------------------------------------------------------------------ qk_norm


def test_normalised_heads_are_of_length_one_times_the_gain() -> None:
    q, k = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64) * 7
    normalised_q, normalised_k = normalised_heads(q, k)
    torch.testing.assert_close(normalised_k, k / k.pow(2).mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(normalised_q, QK_GAIN * q / q.pow(2).mean(-1, keepdim=True).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_normalised_heads_have_the_same_bits_in_any_batch(num_threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 520, 8, 40).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        whole = normalised_heads(q, k)
        for count in (1, 2, 3, 4, 7, 16, 33, 64, 130, 511):
            for part, all_rows in zip(normalised_heads(q[:count], k[:count]), whole, strict=True):
                assert torch.equal(part, all_rows[:count]), count
    finally:
        torch.set_num_threads(before)


def test_the_size_of_queries_and_keys_does_not_matter() -> None:
    model, image = _trained(qk_norm=True), _image()
    before = model.logits(TEXT, image)[1]
    inner = CONFIG.num_heads * CONFIG.head_dim
    with torch.no_grad():
        for layer in _layers(model):
            layer.attention.qkv.weight[: 2 * inner] *= 50
    torch.testing.assert_close(model.logits(TEXT, image)[1], before, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ zero_init_branches, x0_scalars


def test_zero_initialised_branches_add_nothing_at_first() -> None:
    model, x = _model(zero_init_branches=True), torch.randn(2, 4, CONFIG.dim)
    for layer in _layers(model):
        assert torch.equal(layer(x, x), x)
        assert (layer.attention.scale == 1).all()
    model(TEXT, _image()).loss.backward()
    for layer in _layers(model):
        gradient = layer.feed_forward.shrink.weight.grad
        assert gradient is not None
        assert gradient.any()


def test_x0_scalars_change_nothing_at_first_and_mix_the_input_in_later() -> None:
    image = _image()
    plain, mixed = _model(), _model(x0_scalars=True)
    assert torch.equal(plain.logits(TEXT, image)[1], mixed.logits(TEXT, image)[1])
    layer = _layers(mixed)[1]
    assert layer.x0_scalars is not None
    with torch.no_grad():
        layer.x0_scalars.copy_(torch.tensor([0.5, -2.0]))
    x, start = torch.randn(2, 2, 4, CONFIG.dim)
    torch.testing.assert_close(layer(x, start), plain.layers[1](0.5 * x - 2 * start, start))


# ----------------------------------------------------------------------------------------------------- target_positions


def test_the_orders_of_all_rows_are_those_without_orders() -> None:
    model, image = _trained(target_positions=True), _image()
    raster = torch.arange(N).expand(2, -1)
    for one, other in zip(model.logits(TEXT, image, raster), model.logits(TEXT, image), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model(TEXT, image, orders=raster).loss, model(TEXT, image).loss)


def test_column_by_column_is_row_by_row_of_a_model_with_swapped_axes() -> None:
    """An independent account of other orders: a transposed image, and tables of rows and columns exchanged."""
    model, image = _trained(target_positions=True), _image()
    swapped = _trained(target_positions=True)
    with torch.no_grad():
        for one, other in (
            (model.image_embedding, swapped.image_embedding),
            (model.target_embedding, swapped.target_embedding),
        ):
            assert one is not None
            assert other is not None
            assert one.rows is not None
            assert one.columns is not None
            assert other.rows is not None
            assert other.columns is not None
            other.rows.copy_(one.columns)
            other.columns.copy_(one.rows)
    by_column = torch.arange(N).view(3, 3).T.flatten()
    noisy = (image + 1) % CONFIG.image_vocab_size
    losses = model(TEXT, image, noisy, by_column.expand(2, -1))
    expected = swapped(TEXT, image[:, by_column], noisy[:, by_column])
    for one, two in zip(losses, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert losses.loss_image != model(TEXT, image, noisy).loss_image


def test_a_token_sees_those_before_it_in_its_order_only() -> None:
    model, image = _trained(target_positions=True), _image()
    orders = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    before = model.logits(TEXT, image, orders)[1]
    changed = image.clone()
    changed[:, 4] = (changed[:, 4] + 1) % CONFIG.image_vocab_size
    after = model.logits(TEXT, changed, orders)[1]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_the_caption_is_the_same_in_any_order_and_the_first_cell_is_known() -> None:
    """Text logits do not depend on the order; the first image logits depend on which cell comes first, and only there."""
    model, image = _trained(target_positions=True), _image()
    orders = torch.stack([torch.arange(N), torch.arange(N).roll(1)])
    text, first = model.logits(TEXT[:1].expand(2, -1), image[:1].expand(2, -1), orders)
    assert torch.equal(text[0], text[1])
    assert not torch.equal(first[0, 0], first[1, 0])


def test_what_decoders_add_is_what_the_forward_pass_adds() -> None:
    model, image = _trained(target_positions=True), _image()
    x = torch.cat(
        [model.embed_prefix(TEXT), F.embedding(image, model.image_embedding.tokens) + model.input_positions()], dim=1
    )[:, :-1]
    hidden = x
    for layer in _layers(model):
        hidden = layer(hidden, x)
    torch.testing.assert_close(model.head(hidden)[1], model.logits(TEXT, image)[1], rtol=0, atol=1e-5)
    assert torch.equal(_model().input_positions(), _model().image_embedding.position_table())


def test_tables_of_small_models_start_small() -> None:
    torch.manual_seed(0)
    table = KoDalle(CONFIG.model_copy(update=ALL | {"dim": 256}), embedding_std=0.02).target_embedding
    assert table is not None
    assert table.rows.std().item() == pytest.approx(0.02, rel=0.1)
