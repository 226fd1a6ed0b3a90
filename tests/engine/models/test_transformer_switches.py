"""DALLE-pytorch's switches of the transformer: what each computes, written a second time."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from engine.config.transformer import AttentionPattern, TransformerConfig
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.models.whole_sequence import pattern_mask, rotated, shift_tokens

CONFIG = TransformerConfig(
    dim=24, num_layers=3, num_heads=2, head_dim=8, text_vocab_size=20, text_seq_len=5, text_position_rows=9,
    image_vocab_size=13, image_grid_size=3,
)  # fmt: skip
TEXT = torch.tensor([[0, 3, 4, 2, 1], [0, 5, 6, 7, 2]])
IMAGE = torch.arange(18).view(2, 9) % 13


def _model(**switches: Any) -> KoDalle:
    torch.manual_seed(0)
    model = KoDalle(CONFIG.model_copy(update=switches)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def _attention(layer: Layer, x: Tensor) -> Tensor:
    """The attention branch of x, before its scale and the norm behind it."""
    branch = layer.attention
    q, k, v = branch.qkv(_norm(x, branch.norm)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(
        torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf
    )
    return branch.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _feed_forward(layer: Layer, x: Tensor) -> Tensor:
    branch = layer.feed_forward
    value, gate = branch.grow(_norm(x, branch.norm)).chunk(2, dim=-1)
    return branch.shrink(value * F.gelu(gate))


def _image_logits(model: KoDalle, x: Tensor) -> Tensor:
    return F.linear(_norm(x[:, 5:], model.head.norm), *model.head.image_rows())


def _inputs(model: KoDalle) -> Tensor:
    return torch.cat([model.text_embedding(TEXT), model.image_embedding(IMAGE[:, :-1])], dim=1)


@torch.no_grad()
def test_reversible_layers_have_two_streams() -> None:
    model = _model(reversible=True)
    first = second = _inputs(model)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        first = first + layer.attention.scale * _attention(layer, second)
        second = second + layer.feed_forward.scale * _feed_forward(layer, first)
    torch.testing.assert_close(
        model.logits(TEXT, IMAGE)[1], _image_logits(model, (first + second) / 2), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_sandwich_norm_normalises_every_branch() -> None:
    model = _model(sandwich_norm=True)
    x = _inputs(model)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        assert layer.attention.norm_out is not None
        assert layer.feed_forward.norm_out is not None
        x = x + layer.attention.scale * _norm(_attention(layer, x), layer.attention.norm_out)
        x = x + layer.feed_forward.scale * _norm(_feed_forward(layer, x), layer.feed_forward.norm_out)
    torch.testing.assert_close(model.logits(TEXT, IMAGE)[1], _image_logits(model, x), atol=1e-4, rtol=1e-4)


def test_stable_divides_by_the_largest_channel_and_damps_the_embeddings_gradient() -> None:
    plain, stable = _model(), _model(stable=True)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(stable.from_streams(x), x / x.max(dim=-1, keepdim=True).values)
    assert plain.from_streams(x) is x
    # A LayerNorm follows, to which only its epsilon tells the difference: the same function, nearly.
    torch.testing.assert_close(stable.logits(TEXT, IMAGE)[1], plain.logits(TEXT, IMAGE)[1], atol=1e-3, rtol=1e-3)
    gradients = []
    for model in (plain, stable):
        with torch.no_grad():
            model.head.norm.eps = 0.0
        model(TEXT, IMAGE).loss.backward()
        assert model.text_embedding.tokens.grad is not None
        gradients.append(model.text_embedding.tokens.grad)
    # The largest channel is a constant to the gradient; along x, where it counts, a LayerNorm has none.
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0], atol=1e-5, rtol=1e-2)


# ------------------------------------------------------------------------------------------- what reads a whole sequence


def test_token_shift_takes_channels_of_neighbours() -> None:
    x = torch.randn(1, 6 + 7, 24)  # <bos> and 5 text tokens, then 7 of 9 cells
    shifted = shift_tokens(x, CONFIG)
    for position in range(6):
        before = x[0, position - 1, :12] if position else torch.zeros(12)
        assert torch.equal(shifted[0, position], torch.cat([before, x[0, position, 12:]]))
    for cell in range(7):
        above = x[0, 6 + cell - 3, :6] if cell >= 3 else torch.zeros(6)
        left = x[0, 6 + cell - 1, 6:12] if cell % 3 else torch.zeros(6)
        assert torch.equal(shifted[0, 6 + cell], torch.cat([above, left, x[0, 6 + cell, 12:]]))
    assert shift_tokens(x[:, :6], CONFIG).shape == (1, 6, 24)


def test_rotary_positions_turn_pairs_of_channels() -> None:
    """A third of the channels for the place in the text, for the row and for the column, as complex numbers times e^(i angle)."""
    config = CONFIG.model_copy(update={"head_dim": 16})
    x = torch.randn(1, 6 + 9, 2, 16)
    pairs = torch.view_as_complex(x[..., :12].unflatten(-1, (6, 2)).contiguous())
    words, pixels = [1.0, 10000 ** (-2 / 5)], [math.pi, 5 * math.pi]
    for position in range(15):
        cell = position - 6
        text, row, column = (position, -10.0, -10.0) if cell < 0 else (8192.0, cell // 3 - 1.0, cell % 3 - 1.0)
        angles = [text * f for f in words] + [row * f for f in pixels] + [column * f for f in pixels]
        expected = torch.view_as_real(pairs[0, position] * torch.exp(1j * torch.tensor(angles))).flatten(-2)
        torch.testing.assert_close(rotated(x, config)[0, position, :, :12], expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(rotated(x, config)[..., 12:], x[..., 12:])
    torch.testing.assert_close(rotated(x[:, :8], config), rotated(x, config)[:, :8])


@pytest.mark.parametrize("pattern", ["full", "axial_row", "axial_col", "conv", "conv_symmetric"])
def test_patterns(pattern: AttentionPattern) -> None:
    P, g = 4, 7
    mask = pattern_mask(pattern, P, g, torch.device("cpu"))
    for query in range(P + g * g):
        for key in range(P + g * g):
            allowed = key <= query
            if allowed and key >= P:
                down, right = (query - P) // g - (key - P) // g, (query - P) % g - (key - P) % g
                allowed = {
                    "full": True, "axial_row": down == 0, "axial_col": right == 0,
                    "conv": 0 <= down <= 4 and 0 <= right <= 4,
                    "conv_symmetric": abs(down) <= 2 and abs(right) <= 2,
                }[pattern]  # fmt: skip
            assert mask[query, key] == allowed, (query, key)


@torch.no_grad()
def test_patterns_are_cycled_over_the_layers() -> None:
    """A later cell of another row and column changes nothing; with full attention it would."""
    model = _model(attention_patterns=("axial_row", "axial_col"))
    assert [layer.attention.pattern for layer in model.layers] == ["axial_row", "axial_col", "axial_row"]  # type: ignore[union-attr]
    changed = IMAGE.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 13
    one_layer = KoDalle(CONFIG.model_copy(update={"num_layers": 1, "attention_patterns": ("axial_row",)})).eval()
    difference = (one_layer.logits(TEXT, IMAGE)[1] - one_layer.logits(TEXT, changed)[1]).abs().amax(dim=(0, 2))
    # Token i of the input predicts token i + 1: cell 0 is read by the outputs of the first row's cells.
    assert (difference[1:4] > 0).all()
    assert difference[0] == 0
    assert (difference[4:] == 0).all()


@pytest.mark.parametrize(
    "switch", [{"token_shift": True}, {"rotary": True}, {"attention_patterns": ("conv", "axial_col")}]
)
def test_no_position_sees_the_future(switch: dict[str, Any]) -> None:
    model = _model(**switch)
    later = IMAGE.clone()
    later[:, 5:] = (later[:, 5:] + 3) % 13
    logits, others = model.logits(TEXT, IMAGE)[1], model.logits(TEXT, later)[1]
    torch.testing.assert_close(logits[:, :6], others[:, :6])
    assert not torch.allclose(logits[:, 6:], others[:, 6:])
    # The last one read is the sixth: from five inputs on, whole passes give what the full sequence does.
    torch.testing.assert_close(model.outputs(TEXT, IMAGE[:, :5])[:, -1], model.outputs(TEXT, IMAGE[:, :8])[:, -4])
    model(TEXT, IMAGE).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rotary_has_no_tables_of_positions() -> None:
    names = _model(rotary=True).state_dict().keys()
    assert not {"text_embedding.positions", "image_embedding.rows", "image_embedding.columns"} & names


def test_switches_that_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="x0_scalars mix one stream with its start, and reversible has two"):
        TransformerConfig(reversible=True, x0_scalars=True)


def test_every_parameter_learns() -> None:
    model = _model(reversible=True, sandwich_norm=True, stable=True, unique_padding=True)
    model(TEXT, IMAGE).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
