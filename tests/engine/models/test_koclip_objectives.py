"""The objectives beside KoCLIP's contrastive loss: formulas, weights, gradients, and two ranks as one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.ranker import KoclipConfig
from engine.config.stages import KoclipLossConfig
from engine.models.koclip import KoClip
from engine.models.koclip_losses import nt_xent, simsiam
from engine.models.koclip_objectives import KoClipWithObjectives, MaskedCaptions
from tests.engine.models.test_koclip import TINY, _pairs
from tests.engine.models.test_koclip_encoders import LITE0
from tests.forked import run_forked

SMALL = {"image_ssl_dim": 6, "image_ssl_hidden_dim": 10}
ALL = KoclipLossConfig(image_ssl="simsiam", masked_language_weight=0.2, image_ssl_weight=0.3, decoupled=True, **SMALL)


def _model(loss: KoclipLossConfig, config: KoclipConfig = TINY) -> KoClipWithObjectives:
    torch.manual_seed(0)
    return KoClipWithObjectives(KoClip(config), loss).eval()


def _batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, MaskedCaptions]:
    """Four pairs; the captions have one, two, two and no masked tokens."""
    images, tokens = _pairs(4)
    views = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    positions = torch.tensor([[3, 0], [1, 2], [4, 5], [0, 0]])
    originals = torch.full((4, 2), -100)
    masked = tokens.clone()
    for row, count in enumerate((1, 2, 2, 0)):
        for k in range(count):
            place = int(positions[row, k])
            originals[row, k], masked[row, place] = tokens[row, place], 4
    return images[rows], tokens[rows], views[rows], MaskedCaptions(masked[rows], positions[rows], originals[rows])


def test_losses_equal_their_formulas() -> None:
    model = _model(ALL)
    images, tokens, views, masked = _batch()
    found = model(images, tokens, views=views, masked=masked)
    koclip = model.koclip
    plain = koclip(images, tokens, decoupled=True)
    torch.testing.assert_close(found.contrastive, plain)
    features = koclip.encode_pixels(koclip.prepare(views.flatten(0, 1)))
    projections = model.image_ssl.projector(features)
    predictions = model.image_ssl.predictor(projections)
    torch.testing.assert_close(found.image_ssl, simsiam(predictions.view(4, 2, 6), projections.view(4, 2, 6)))
    hidden = koclip.text_encoder(masked.text_tokens)
    nats = [
        -model.masked_language(hidden[row, place]).log_softmax(0)[tokens[row, place]].item()
        for row, places in enumerate(([3], [1, 2], [4, 5], []))
        for place in places
    ]
    assert found.masked_language.item() == pytest.approx(sum(nats) / 5, rel=1e-5)
    total = 0.5 * plain + 0.3 * found.image_ssl + 0.2 * found.masked_language
    torch.testing.assert_close(found.total, total)


@pytest.mark.parametrize("token_similarity", [False, True])
def test_simclr_of_the_projector_s_rows(token_similarity: bool) -> None:
    loss = KoclipLossConfig(image_ssl="simclr", image_ssl_temperature=0.5, **SMALL)
    model = _model(loss, TINY.model_copy(update={"token_similarity": token_similarity}))
    images, tokens, views, _ = _batch()
    found = model(images, tokens, views=views)
    features = model.koclip.encode_pixels(model.koclip.prepare(views.flatten(0, 1)))
    features = features.mean(1) if token_similarity else features
    expected = nt_xent(model.image_ssl.projector(features).view(4, 2, 6), temperature=0.5)
    torch.testing.assert_close(found.image_ssl, expected)
    torch.testing.assert_close(found.total, 0.95 * found.contrastive + 0.05 * expected)
    assert found.masked_language is None
    assert not hasattr(model, "masked_language")


def test_a_batch_without_masked_tokens_has_no_loss_of_them() -> None:
    model = _model(ALL)
    images, tokens, _, masked = _batch(slice(3, 4))
    assert model(images, tokens, masked=masked).masked_language.item() == 0


def _losses_and_gradients(rows: slice, *, all_gather: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    config = TINY.model_copy(update={"token_similarity": True, "direction_projections": True})
    model = _model(ALL, config)  # eval: BatchNorm's batch statistics in the encoder are of a rank by nature
    images, tokens, views, masked = _batch(rows)
    losses = model(images, tokens, views=views, masked=masked, all_gather=all_gather)
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses], gradients


def _on_two_ranks(rank: int, store: str, answers: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(_losses_and_gradients(slice(rank * 2, rank * 2 + 2), all_gather=True), f"{answers}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Of all options together; the second rank has fewer masked tokens than the first."""
    answers = str(tmp_path / "answers")
    jobs = [(_on_two_ranks, (rank, str(tmp_path / "store"), answers)) for rank in range(2)]
    printed = run_forked(jobs, tmp_path, preload=["engine.models.koclip_objectives", "transformers"])
    assert [code for code, _ in printed] == [0, 0], printed
    (losses_0, gradients_0), (losses_1, gradients_1) = (torch.load(f"{answers}.{rank}") for rank in range(2))
    losses, gradients = _losses_and_gradients(slice(0, 4), all_gather=True)
    for one, other, expected in zip(losses_0, losses_1, losses, strict=True):
        torch.testing.assert_close((one + other) / 2, expected)
    assert gradients_0.keys() == gradients.keys() >= {
        "image_ssl.projector.0.weight", "masked_language.weight", "koclip.caption_search_text_projection.fc.weight",
    }  # fmt: skip
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, expected in gradients.items():
        average = (gradients_0[name] + gradients_1[name]) / 2
        # The projector's BatchNorm magnifies the rounding of features that hardly differ.
        assert (average - expected).norm() <= 1e-2 * expected.norm() + 1e-4 * largest, name


@pytest.mark.parametrize("config", [TINY, LITE0], ids=["efficientnet", "lite0"])
def test_in_bfloat16_losses_are_near_float32(config: KoclipConfig) -> None:
    """As DeepSpeed casts them: weights, not what the losses are computed in."""
    model = _model(ALL, config.model_copy(update={"token_similarity": True, "direction_projections": True}))
    images, tokens, views, masked = _batch()
    expected = model(images, tokens, views=views, masked=masked)
    found = model.bfloat16()(images, tokens, views=views, masked=masked)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=0.3)
    found.total.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
