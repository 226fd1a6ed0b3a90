"""KoCLIP has the published sizes, ignores padding, learns, and compares pairs across ranks as one process would."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.config.ranker import KoclipConfig
from engine.errors import InputError
from engine.models.koclip import KnownPairs, KoClip, ProjectionHead
from tests.forked import run_forked

TINY = KoclipConfig(
    image_size=32,
    image_width=0.1,
    image_depth=0.3,
    image_hidden_dim=128,
    text_vocab_size=60,
    text_seq_len=12,
    text_dim=32,
    text_layers=1,
    text_heads=2,
    text_ff_dim=48,
    text_position_rows=14,
    embed_dim=24,
)


def _tiny(**changes: object) -> KoclipConfig:
    return TINY.model_copy(update=changes)


def _pairs(count: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 60, (count, 8), generator=generator)
    tokens[:, 0] = 0
    return torch.rand(count, 3, 32, 32, generator=generator), tokens


@pytest.fixture(scope="module")
def koclip() -> KoClip:
    torch.manual_seed(0)
    return KoClip(TINY).eval()


# --------------------------------------------------------------------------------------------------------------- sizes


def test_published_parameter_counts() -> None:
    def build(**changes: object) -> KoClip:
        with torch.device("meta"):
            return KoClip(KoclipConfig.model_validate(changes))

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    published = build(similarity="published")
    assert count(published) == 116_202_620
    assert count(published.text_encoder) == 110_618_112
    assert count(published.image_encoder) == 4_007_548
    cosine = build()
    assert count(cosine) == 116_202_620 - 590_592 + 1  # no unread pooling layer, a temperature
    assert count(build(head="linear", similarity="published")) == 115_675_260


def test_a_width_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="write image_hidden_dim: 128"):
        KoClip(_tiny(image_hidden_dim=1280))
    with pytest.raises(InputError, match="divisible by text_heads"):
        KoClip(_tiny(text_heads=3))


# ---------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_projection_head_equals_its_formula(kind: str) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(10, 6, kind=kind, dropout=0.5).eval()  # type: ignore[arg-type]
    features = torch.randn(3, 10)
    projected = features @ head.projection.weight.T + head.projection.bias
    if kind == "mlp":
        inner = F.gelu(projected) @ head.fc.weight.T + head.fc.bias + projected
        mean, variance = inner.mean(1, keepdim=True), inner.var(1, keepdim=True, unbiased=False)
        expected = (inner - mean) / (variance + 1e-5).sqrt()
    else:
        expected = projected
    torch.testing.assert_close(head(features), expected)


@torch.no_grad()
def test_embeddings_and_scores(koclip: KoClip) -> None:
    images, tokens = _pairs(3)
    image, text = koclip.embed_images(images), koclip.embed_texts(tokens[:2])
    assert image.shape == (3, 24)
    assert text.shape == (2, 24)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    scores = koclip.similarity(images, tokens[:2])
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores, text @ image.T)
    assert scores.abs().max() <= 1 + 1e-6


@torch.no_grad()
def test_published_similarity() -> None:
    torch.manual_seed(0)
    published = KoClip(_tiny(similarity="published")).eval()
    assert "logit_scale" not in dict(published.named_parameters())
    images, tokens = _pairs()
    image, text = published.embed_images(images), published.embed_texts(tokens)
    torch.testing.assert_close(published.similarity(images, tokens), text @ image.T * 0.07)
    torch.testing.assert_close(published.prepare(images), images * 255)
    logits = text @ image.T * 0.07
    logs = -logits.log_softmax(1).diagonal().mean() / 2 - logits.log_softmax(0).diagonal().mean() / 2
    torch.testing.assert_close(published.loss(image, text), logs)


def test_preparation(koclip: KoClip) -> None:
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(koclip.prepare(images), (images - mean) / std)
    # 64 px checkerboard: antialiasing sees grey, plain bilinear sampling or striding would see black or white
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().expand(1, 3, 64, 64)
    grey = koclip.prepare(board) * std + mean
    torch.testing.assert_close(grey[..., 2:-2, 2:-2], torch.full((1, 3, 28, 28), 0.5))


@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_change_nothing(koclip: KoClip) -> None:
    images, tokens = _pairs(3)
    padded = F.pad(tokens, (0, 4), value=1)
    torch.testing.assert_close(koclip.embed_texts(padded), koclip.embed_texts(tokens), rtol=1e-4, atol=1e-5)
    alone = torch.cat([koclip.embed_images(image[None]) for image in images])
    torch.testing.assert_close(alone, koclip.embed_images(images), rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_refused(koclip: KoClip) -> None:
    with pytest.raises(ValueError, match="float in"):
        koclip.embed_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="13 text tokens, this KoCLIP has 12"):
        koclip.embed_texts(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        koclip.embed_texts(torch.zeros(1, 4))


# ------------------------------------------------------------------------------------------------------------ training


def test_temperature_is_bounded_and_can_return() -> None:
    torch.manual_seed(0)
    model = KoClip(TINY)
    torch.testing.assert_close(model.temperature_scale(), torch.tensor(1 / 0.07))
    model.logit_scale.data.fill_(9.0)
    scale = model.temperature_scale()
    torch.testing.assert_close(scale, torch.tensor(100.0))
    scale.backward()
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad > 0


def test_pairs_that_fit_are_left_out_of_both_softmaxes(koclip: KoClip) -> None:
    """By the formula, pair by pair; images without captions stay negatives of all."""
    generator = torch.Generator().manual_seed(3)
    image, text, extra = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (4, 4, 2))
    fits = torch.eye(4, dtype=torch.bool)
    fits[0, 2] = fits[2, 0] = fits[3, 1] = True  # equal captions; a caption that one more image fits
    fits[1, 1] = False  # a pair's own image counts whatever the matrix says
    products = (torch.exp(text @ torch.cat([image, extra]).T / 0.07)).double()
    expected = 0.0
    for i in range(4):
        own = products[i, i]
        images = sum(products[i, j] for j in range(6) if j == i or j >= 4 or not fits[i, j])
        captions = sum(products[j, i] for j in range(4) if j == i or not fits[j, i])
        expected -= float((own / images).log() + (own / captions).log()) / 8
    loss = koclip.loss(image, text, negatives=extra, fits=fits)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss < koclip.loss(image, text, negatives=extra)
    assert koclip.loss(image, text, fits=torch.ones(4, 4, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-6)
    none = torch.eye(4, dtype=torch.bool)
    assert torch.equal(koclip.loss(image, text, fits=none), koclip.loss(image, text))


def test_captions_that_are_wrong_about_an_image_compete_for_it_alone(koclip: KoClip) -> None:
    """By the formula; the second image has none."""
    generator = torch.Generator().manual_seed(4)
    image, text = (F.normalize(torch.randn(3, 24, generator=generator), dim=1) for _ in range(2))
    wrong = F.normalize(torch.randn(3, 2, 24, generator=generator), dim=2)
    has_wrong = torch.tensor([True, False, True])
    expected = 0.0
    for i in range(3):
        products = torch.exp(text.double() @ image.double().T / 0.07)
        own = products[i, i]
        others = torch.exp(wrong[i].double() @ image[i].double() / 0.07).sum() if has_wrong[i] else 0.0
        expected -= float((own / products[i].sum()).log() + (own / (products[:, i].sum() + others)).log()) / 6
    loss = koclip.loss(image, text, wrong=wrong, has_wrong=has_wrong)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    nothing = koclip.loss(image, text, wrong=wrong, has_wrong=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(nothing, koclip.loss(image, text))


@pytest.mark.slow
def test_learns_and_evaluates_sanely() -> None:
    """From scratch, in eval mode. With the BatchNorm gains of N(0, 0.02) of transformers the loss would not fall."""
    torch.manual_seed(0)
    model = KoClip(_tiny(dropout=0.0, text_dim=64)).train()
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])[:, :, None, None]
    captions = torch.tensor([[0, word, 2] for word in range(10, 16)])

    def photographs(copies: int) -> Tensor:
        return colours.repeat(copies, 1, 1, 1) * 0.8 + 0.2 * torch.rand(6 * copies, 3, 32, 32)

    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for step in range(80):
        optimiser.param_groups[0]["lr"] = 6e-3 * (1 - step / 80)  # running statistics must catch up with the weights
        loss = model(photographs(4), captions.repeat(4, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1.6  # chance: log(24) = 3.2; best: log(4) = 1.4, as every caption comes four times
    scores = model.eval().similarity(photographs(1), captions)
    assert scores.argmax(1).tolist() == list(range(6))


def _loss_on_two_ranks(rank: int, store: str, answers: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(_loss_and_gradients(slice(rank * 2, rank * 2 + 2), all_gather=True), f"{answers}.{rank}")
    dist.destroy_process_group()


def _loss_and_gradients(rows: slice, *, all_gather: bool) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = KoClip(TINY).eval()  # eval: BatchNorm's batch statistics are of a rank by nature
    images, tokens = _pairs(4)
    fits = torch.eye(4, dtype=torch.bool)
    fits[0, 3] = fits[2, 1] = True  # an image of the other rank fits a caption of this one
    wrong = tokens.roll(1, dims=0)[:, None].repeat(1, 2, 1)
    has_wrong = torch.tensor([True, True, False, True])
    known = KnownPairs(None, fits[rows], wrong[rows], has_wrong[rows])
    loss = model(images[rows], tokens[rows], known=known, all_gather=all_gather)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    answers = str(tmp_path / "answers")
    jobs = [(_loss_on_two_ranks, (rank, str(tmp_path / "store"), answers)) for rank in range(2)]
    printed = run_forked(jobs, tmp_path, preload=["engine.models.koclip", "transformers"])
    assert [code for code, _ in printed] == [0, 0], printed
    (loss_0, gradients_0), (loss_1, gradients_1) = (torch.load(f"{answers}.{rank}") for rank in range(2))
    loss, gradients = _loss_and_gradients(slice(0, 4), all_gather=True)  # no process group: just the batch
    torch.testing.assert_close(loss_0, loss)
    torch.testing.assert_close(loss_1, loss)
    assert set(gradients_0) == set(gradients) >= {"logit_scale", "text_projection.projection.weight"}
    for name, expected in gradients.items():
        average = (gradients_0[name] + gradients_1[name]) / 2
        torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-5)
