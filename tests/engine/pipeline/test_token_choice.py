"""Which tokens of an init image are sampled anew: against a plain reading, place by place."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.models.transformer import KoDalle
from engine.pipeline.token_choice import Captions, least_likely, tokens_to_sample

CONFIG = TransformerConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    text_vocab_size=30,
    text_seq_len=6,
    text_position_rows=8,
    image_vocab_size=20,
    image_grid_size=4,
)
BEFORE, NOW, EMPTY = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 9, 7, 2, 1, 1], [0, 2, 1, 1, 1, 1]])
TOKENS = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(1))
# Two looks of ten equal codes each: a token's look is all ten.
LOOKS = torch.arange(20) % 2
VECTORS = torch.nn.functional.one_hot(LOOKS, 2).float()


@pytest.fixture(scope="module")
def model() -> KoDalle:
    """With weights so large that a word of the caption moves every token."""
    model = KoDalle(CONFIG, embedding_std=1.0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def _guided(model: KoDalle, caption: Tensor, tokens: Tensor) -> Tensor:
    """(N, K) log-probabilities, the plain way."""
    with torch.no_grad():
        own, empty = (model.logits(text[None], tokens[None])[1][0] for text in (caption, EMPTY))
    return (empty + 3 * (own - empty)).log_softmax(-1)


def _look(log_p: Tensor, token: Tensor) -> float:
    """The log-likelihood of a token's look at one place."""
    return math.log(float(log_p.exp()[LOOKS[token] == LOOKS].sum()))


def test_reading_along_in_passes_is_reading_place_by_place(model: KoDalle) -> None:
    current, expected = TOKENS.clone(), []
    for place in range(16):
        before = _look(_guided(model, BEFORE, TOKENS)[place], TOKENS[place])
        log_p = _guided(model, NOW, current)[place]
        falls = before - _look(log_p, TOKENS[place]) > math.log(2)
        expected.append(falls)
        if falls:
            current[place] = log_p.argmax()
    found = tokens_to_sample(model, VECTORS, Captions(NOW, BEFORE, EMPTY), TOKENS, strength=None)
    assert found.tolist() == expected
    assert any(expected)
    assert not all(expected)


class _Ended(Exception):
    pass


@pytest.mark.parametrize(("before", "at"), [(BEFORE, 1), (BEFORE, 2), (BEFORE, 3), (None, 1)])
def test_a_caller_can_end_it_before_any_pass(
    model: KoDalle, monkeypatch: pytest.MonkeyPatch, before: Tensor | None, at: int
) -> None:
    """Of a large model a pass takes seconds, and there are as many as places at worst."""
    passes, looks, logits = [0], [0], model.logits

    def counted(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        passes[0] += 1
        return logits(*arguments)

    def look() -> None:
        looks[0] += 1
        if looks[0] == at:
            raise _Ended

    monkeypatch.setattr(model, "logits", counted)
    with pytest.raises(_Ended):
        tokens_to_sample(
            model,
            VECTORS,
            Captions(NOW, before, EMPTY),
            TOKENS,
            strength=None if before is not None else 0.5,
            before_pass=look,
        )
    assert passes[0] == at - 1


def test_strength_takes_the_least_likely_looks(model: KoDalle) -> None:
    log_p = _guided(model, NOW, TOKENS)
    likelihoods = [_look(log_p[place], TOKENS[place]) for place in range(16)]
    found = tokens_to_sample(model, VECTORS, Captions(NOW, None, EMPTY), TOKENS, strength=0.25)
    assert set(found.nonzero()[:, 0].tolist()) == set(sorted(range(16), key=lambda place: likelihoods[place])[:4])


@pytest.mark.parametrize("before", [None, BEFORE])
def test_a_higher_strength_takes_what_a_lower_one_takes_and_more(model: KoDalle, before: Tensor | None) -> None:
    strengths = [0.0, 0.1, 0.5, 0.9, 1.0]
    taken = [
        tokens_to_sample(model, VECTORS, Captions(NOW, before, EMPTY), TOKENS, strength=strength)
        for strength in strengths
    ]
    assert [int(each.sum()) for each in taken] == [round(strength * 16) for strength in strengths]
    assert all((less & ~more).sum() == 0 for less, more in itertools.pairwise(taken))


def test_the_same_caption_touches_nothing(model: KoDalle) -> None:
    assert not tokens_to_sample(model, VECTORS, Captions(NOW, NOW, EMPTY), TOKENS, strength=None).any()


def test_a_model_without_an_empty_caption_reads_without_guidance(model: KoDalle) -> None:
    found = tokens_to_sample(model, VECTORS, Captions(NOW, None, None), TOKENS, strength=0.5)
    assert int(found.sum()) == 8


def test_of_equals_the_first_are_taken() -> None:
    assert least_likely(torch.tensor([2.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [False, True, True, False]
