"""Log-likelihood of what is kept after a regenerated hole, against a plain computation."""

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.models.transformer import KoDalle
from engine.pipeline.likelihood import log_likelihoods

CONFIG = TransformerConfig(
    dim=32,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    text_vocab_size=30,
    text_seq_len=6,
    text_position_rows=8,
    image_vocab_size=20,
    image_grid_size=3,
)
TEXT = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 9, 2, 1, 1, 1]])
REGENERATED = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)


@pytest.fixture(scope="module")
def model() -> KoDalle:
    torch.manual_seed(0)
    return KoDalle(CONFIG, embedding_std=1.0)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 20, (6, 9), generator=torch.Generator().manual_seed(1))


def test_is_the_sum_over_what_is_kept_after_the_hole(model: KoDalle, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = [
            sum(
                float(model.logits(TEXT[row // 3][None], tokens[row : row + 1, : place + 1])[1][0, place]
                      .log_softmax(0)[tokens[row, place]])
                for place in (5, 7, 8)
            )
            for row in range(6)
        ]  # fmt: skip
    scores = log_likelihoods(model, TEXT, tokens, REGENERATED)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
    assert len(set(scores.tolist())) == 6


def test_a_sequence_scores_the_same_in_any_batch(model: KoDalle, tokens: Tensor) -> None:
    whole = log_likelihoods(model, TEXT, tokens, REGENERATED)
    assert torch.equal(log_likelihoods(model, TEXT[1:], tokens[4:5], REGENERATED), whole[4:5])


def test_nothing_after_the_hole_is_zero_and_the_mode_stays(model: KoDalle, tokens: Tensor) -> None:
    model.train()
    last_row = torch.arange(9) >= 6
    assert log_likelihoods(model, TEXT, tokens, last_row).tolist() == [0] * 6
    assert model.training
    model.eval()
