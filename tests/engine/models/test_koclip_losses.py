"""KoCLIP's losses against loops that spell their formulas out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models import koclip_losses
from engine.models.koclip_losses import contrastive_loss, nt_xent, simsiam, token_similarities


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("decoupled", [False, True])
def test_contrastive_loss_equals_its_formula(decoupled: bool) -> None:
    """Four captions, six images, one pair left out, five columns of captions: a caption more than there are images."""
    generator = torch.Generator().manual_seed(1)
    to_images, to_captions = torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    to_images[0, 2] = to_captions[2, 0] = -math.inf
    expected = 0.0
    for logits in (to_images, to_captions):
        for i, row in enumerate(logits.tolist()):
            below = sum(math.exp(value) for j, value in enumerate(row) if j != i or not decoupled)
            expected -= math.log(math.exp(row[i]) / below) / 8
    assert contrastive_loss(to_images, to_captions, decoupled=decoupled).item() == pytest.approx(expected, rel=1e-5)


def test_decoupled_leaves_a_row_without_negatives_alone() -> None:
    logits = torch.full((2, 2), -math.inf)
    logits[0, 0], logits[1, 1], logits[1, 0] = 2.0, 3.0, 1.0
    logits.requires_grad_()
    loss = contrastive_loss(logits, logits.T, decoupled=True)
    # row 0 has no negative, column 1 neither; row 1: 1 - 3, column 0: 1 - 2
    assert loss.item() == pytest.approx(((1 - 3) / 2 + (1 - 2) / 2) / 2)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.0], [0.5, -0.25]]))
    alone = torch.ones(1, 1, requires_grad=True)
    assert contrastive_loss(alone, alone, decoupled=True).item() == 0


def test_token_similarities_equal_their_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = _unit(3, 4, 8).requires_grad_(), _unit(2, 5, 8, seed=1)
    lengths = (5, 2)
    texts[1, 2:] = 0
    texts.requires_grad_()
    to_images, to_captions = token_similarities(images, texts)
    for m, length in enumerate(lengths):
        for b in range(3):
            cosines = [[(texts[m, t] @ images[b, p]).item() for p in range(4)] for t in range(length)]
            best_cells = sum(max(row) for row in cosines) / length
            best_tokens = sum(max(row[p] for row in cosines) for p in range(4)) / 4
            assert to_images[m, b].item() == pytest.approx(best_cells, abs=1e-6)
            assert to_captions[b, m].item() == pytest.approx(best_tokens, abs=1e-6)
    (to_images.sum() + to_captions.sum()).backward()
    assert texts.grad is not None
    assert images.grad is not None
    assert images.grad.isfinite().all()
    monkeypatch.setattr(koclip_losses, "_SIMILARITIES_AT_ONCE", 60)  # one caption at a time
    parts = token_similarities(images, texts)
    torch.testing.assert_close(parts, (to_images, to_captions), rtol=0, atol=1e-6)


def test_nt_xent_equals_its_formula() -> None:
    projections, temperature = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2)), 0.2
    views = [(i, v) for i in range(3) for v in range(2)]
    expected = 0.0
    for i, v in views:

        def exp(j: int, w: int, i: int = i, v: int = v) -> float:
            return math.exp(float(F.cosine_similarity(projections[i, v], projections[j, w], dim=0)) / temperature)

        below = sum(exp(j, w) for j, w in views if (j, w) != (i, v))
        expected -= math.log(exp(i, 1 - v) / below) / len(views)
    assert nt_xent(projections, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_simsiam_equals_its_formula_and_stops_the_targets_gradient() -> None:
    predictions, projections = (torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4))
    predictions.requires_grad_()
    projections.requires_grad_()
    expected = sum(
        2 - 2 * float(F.cosine_similarity(predictions[i, v], projections[i, 1 - v], dim=0))
        for i in range(3)
        for v in range(2)
    )
    loss = simsiam(predictions, projections)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)
    loss.backward()
    assert predictions.grad is not None
    assert projections.grad is None
