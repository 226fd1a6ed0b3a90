"""KoCLIP's options of similarity: token by token, and a projection for each direction. Ranking, padding, the fast encoder."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from engine.codec.koclip_encoder import KoclipEncoder
from engine.config.ranker import KoclipConfig
from engine.models.efficientnet_lite0 import NUM_OF_CELL, EfficientNetLite0
from engine.models.folder import Part, load_part, write_model_folder
from engine.models.koclip import KoClip
from engine.models.koclip_encoders import statistics_kept
from tests.engine.models.test_koclip import TINY, _pairs
from tests.engine.models.test_koclip_encoders import LITE0

OPTIONS = [
    {"token_similarity": True},
    {"direction_projections": True},
    {"token_similarity": True, "direction_projections": True},
]


def _koclip(config: KoclipConfig, options: dict[str, bool]) -> KoClip:
    torch.manual_seed(0)
    koclip = KoClip(config.model_copy(update=options | {"dropout": 0.0})).train()
    with torch.no_grad():
        for _ in range(3):
            koclip.embed_images(torch.rand(8, 3, 32, 32))
    return koclip.eval()


def test_parameters_that_options_add() -> None:
    """Published counts stay: see test_koclip. A second pair of heads is as large as the first, and tokens need none."""

    def count(**changes: object) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in KoClip(KoclipConfig.model_validate(changes)).parameters())

    assert count(direction_projections=True) - count() == 655_872 + 393_728 + 2 * 263_680
    assert count(token_similarity=True) == count()


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_options_are_for_cosines(options: dict[str, bool]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(options))} is for similarity cosine: leave it out"):
        KoclipConfig.model_validate(options | {"similarity": "published"})


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", [TINY, LITE0], ids=["efficientnet", "lite0"])
def test_scores_equal_their_formulas(config: KoclipConfig, options: dict[str, bool]) -> None:
    """From the encoders' outputs on, pair by pair; the third caption is padded."""
    koclip = _koclip(config, options)
    images, tokens = _pairs(3)
    tokens[2, 5:] = 1
    features = koclip.encode_pixels(koclip.prepare(images))
    hidden = koclip.text_encoder(tokens)
    heads = [(koclip.image_projection, koclip.text_projection)]
    if koclip.config.direction_projections:
        heads += [(koclip.caption_search_image_projection, koclip.caption_search_text_projection)]
    embedded = koclip.embed_images(images), koclip.embed_texts(tokens)
    found = koclip.scores(*embedded), koclip.caption_scores(*embedded).T
    torch.testing.assert_close(koclip.similarity(images, tokens), found[0])
    assert embedded[0].shape[1:] == koclip.image_embedding_shape
    assert embedded[1].shape[1:] == koclip.text_embedding_shape
    for direction, scores in enumerate(found):
        image_head, text_head = heads[-1 if direction else 0]
        for m, length in enumerate((8, 8, 5)):
            for b in range(3):
                if koclip.config.token_similarity:
                    words = F.normalize(text_head(hidden[m, 1:length]), dim=-1)
                    cells = F.normalize(image_head(features[b]), dim=-1)
                    cosines = words @ cells.T
                    expected = cosines.amax(1 - direction).mean()
                else:
                    expected = F.cosine_similarity(text_head(hidden[m, 0]), image_head(features[b]), dim=0)
                assert scores[m, b].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, *OPTIONS])
@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_takes_each_direction_s_scores(options: dict[str, bool], decoupled: bool) -> None:
    koclip = _koclip(TINY, options)
    images, tokens = _pairs(4)
    fits = torch.eye(4, dtype=torch.bool)
    fits[0, 2] = True
    embedded, texts = koclip.embed_images(torch.cat([images, images.flip(2)[:2]])), koclip.embed_texts(tokens)
    own, negatives = embedded[:4], embedded[4:]
    wrong = koclip.embed_texts(tokens.flip(1).repeat_interleave(2, 0).roll(1, 1)).unflatten(0, (4, 2))
    has_wrong = torch.tensor([True, False, True, True])
    to_images = koclip.scores(embedded, texts) / 0.07
    to_captions = koclip.caption_scores(own, texts) / 0.07
    expected = 0.0
    for i in range(4):
        images_for = [to_images[i, j] for j in range(6) if j != i and (i, j) != (0, 2)]
        captions_for = [to_captions[i, j] for j in range(4) if j != i and (j, i) != (0, 2)]
        if has_wrong[i]:
            captions_for += [koclip.caption_scores(own[[i]], wrong[i, [k]])[0, 0] / 0.07 for k in range(2)]
        for own_logit, others in ((to_images[i, i], images_for), (to_captions[i, i], captions_for)):
            below = torch.stack(others if decoupled else [*others, own_logit]).logsumexp(0)
            expected += float(below - own_logit) / 8
    loss = koclip.loss(
        own, texts, negatives=negatives, fits=fits, wrong=wrong, has_wrong=has_wrong, decoupled=decoupled
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all()
        for name, weight in koclip.named_parameters()
        if "projection" in name
    )


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", [TINY, LITE0], ids=["efficientnet", "lite0"])
def test_the_ranking_encoder_embeds_as_koclip(config: KoclipConfig, options: dict[str, bool]) -> None:
    koclip = _koclip(config, options)
    encoder = KoclipEncoder(koclip)
    images, tokens = _pairs(3)
    tokens[1, 4:] = 1
    found, texts = encoder.embed_images(images), encoder.embed_texts(tokens)
    torch.testing.assert_close(found, koclip.embed_images(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts, koclip.embed_texts(tokens), rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.embed_images(images[[2]]), found[[2]])
    assert torch.equal(encoder.embed_texts(F.pad(tokens[[1]], (0, 4), value=1)), texts[[1]])
    assert torch.equal(KoclipEncoder(koclip).embed_texts(tokens[[1], :6]), texts[[1]])
    for rows, all_of in ((encoder.embed_images(images[:0]), found), (encoder.embed_texts(tokens[:0]), texts)):
        assert rows.shape == (0, *all_of.shape[1:])
    # An image's score for a caption does not depend on the images beside it.
    scores = koclip.scores(found, texts[[1]])
    torch.testing.assert_close(koclip.scores(found[[2]], texts[[1]]), scores[:, [2]], rtol=0, atol=1e-6)


@torch.no_grad()
def test_options_live_in_the_model_folder(tmp_path: Path) -> None:
    koclip = _koclip(LITE0, OPTIONS[2])
    write_model_folder(tmp_path / "model", {"koclip": Part(koclip.config, koclip.state_dict())}, card="")
    loaded: KoClip = load_part(tmp_path / "model", "koclip")
    images, tokens = _pairs(2)
    assert loaded.config == koclip.config
    assert torch.equal(loaded.similarity(images, tokens), koclip.similarity(images, tokens))


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 72])
def test_cells_of_lite0_equal_their_formula(size: int) -> None:
    """72 pixels: the last cells are half outside."""
    torch.manual_seed(0)
    found = EfficientNetLite0(classifier=False).features(torch.rand(1, 3, size, size))
    cells = found.cells()
    grid = -(-size // 16)
    assert cells.shape == (1, grid * grid, NUM_OF_CELL)
    for row, column in ((0, 0), (1, 2), (grid - 1, grid - 1)):
        expected, deviations = [found.head[0, :, row // 2, column // 2], found.taps[3][0, :, row, column]], []
        for tap, side in zip(found.taps[:3], (8, 4, 2), strict=True):
            own = tap[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side].flatten(1)
            expected.append(own.mean(1))
            deviations.append((own.var(1, unbiased=False) + 1e-6).sqrt())
        wanted = torch.cat(expected + deviations)
        torch.testing.assert_close(cells[0, row * grid + column], wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, LITE0], ids=["efficientnet", "lite0"])
def test_statistics_are_kept(config: KoclipConfig) -> None:
    koclip = _koclip(config, {}).train()

    def statistics() -> list[torch.Tensor]:
        names = ("running_mean", "running_var", "feature_mean", "feature_variance")
        return [value.clone() for name, value in koclip.named_buffers() if name.endswith(names)]

    before = statistics()
    with statistics_kept(koclip.image_encoder):
        koclip.embed_images(torch.rand(4, 3, 32, 32))
    assert len(before) > 0
    assert all(map(torch.equal, statistics(), before))
    koclip.embed_images(torch.rand(4, 3, 32, 32))
    assert not any(map(torch.equal, statistics(), before))
