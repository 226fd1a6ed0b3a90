"""RoBERTa's encoder equals transformers' bit for bit: names, initial weights, hidden states, dropout, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.ranker import KoclipConfig
from engine.models.roberta import PAD_TOKEN, Roberta


def _config(**changes: object) -> KoclipConfig:
    sizes = {
        "text_dim": 32,
        "text_heads": 4,
        "text_ff_dim": 48,
        "text_layers": 2,
        "text_vocab_size": 60,
        "dropout": 0.1,
    }
    return KoclipConfig(**sizes, text_seq_len=12, text_position_rows=14, **changes)


def their_config(config: KoclipConfig) -> Any:
    """transformers' config of a text encoder."""
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=config.text_vocab_size,
        hidden_size=config.text_dim,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_ff_dim,
        max_position_embeddings=config.text_position_rows,
        type_vocab_size=1,
        pad_token_id=PAD_TOKEN,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )


def _pair(*, pooled: bool = False) -> tuple[Roberta, Any]:
    from transformers import RobertaModel

    torch.manual_seed(3)
    ours, after = Roberta(_config(), pooled=pooled), torch.rand(2)
    torch.manual_seed(3)
    theirs = RobertaModel(their_config(_config()), add_pooling_layer=pooled).float()
    assert torch.equal(torch.rand(2), after)  # as many random numbers were used
    return ours, theirs


def _tokens() -> Tensor:
    """Four captions of 12, 9, 6 and 1 tokens, padded."""
    tokens = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((12, 9, 6, 1)):
        tokens[row, length:] = PAD_TOKEN
    return tokens


def _their_hidden(model: Any, tokens: Tensor) -> Tensor:
    hidden: Tensor = model(input_ids=tokens, attention_mask=tokens != PAD_TOKEN).last_hidden_state
    return hidden


@pytest.mark.parametrize("pooled", [False, True])
def test_names_and_initial_weights_are_transformers(pooled: bool) -> None:
    ours, theirs = (model.state_dict() for model in _pair(pooled=pooled))
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(name.startswith("pooler.") for name in ours) == pooled


@torch.no_grad()
def test_hidden_states_are_transformers() -> None:
    ours, theirs = (model.eval() for model in _pair())
    tokens = _tokens()
    for given in (tokens, tokens[:1], tokens[1:2, :9], tokens[3:, :1]):
        assert torch.equal(ours(given), _their_hidden(theirs, given))


def test_dropout_and_gradients_are_transformers() -> None:
    ours, theirs = (model.train() for model in _pair())
    torch.manual_seed(5)
    found = ours(_tokens())
    torch.manual_seed(5)
    expected = _their_hidden(theirs, _tokens())
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        gradient = gradients[name]
        assert value.grad is not None and gradient is not None  # noqa: PT018
        assert torch.equal(value.grad, gradient), name


@torch.no_grad()
def test_a_caption_s_states_do_not_depend_on_its_padding() -> None:
    model = Roberta(_config()).eval()
    tokens = _tokens()
    for row, length in enumerate((12, 9, 6, 1)):
        alone = model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(model(tokens)[row, :length], alone, rtol=1e-5, atol=1e-5)
