"""AttnGAN as a benchmark: losses by their formulas, attention, a training that is resumed, and the comparison's figures."""

import copy
import importlib
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.data.pairs import load_pairs
from engine.data.tokenizer import train_tokenizer
from tests.paths import REPOSITORY

CAPTIONS = ("상의에서 색상은 레드이다.", "하의에서 색상은 블루이다. 하의에서 카테고리는 팬츠이다.")


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    return importlib.import_module("baselines.attngan_losses")


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    return importlib.import_module("baselines.attngan_networks")


@pytest.fixture(scope="module")
def attngan() -> ModuleType:
    return importlib.import_module("baselines.attngan")


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    return importlib.import_module("attngan_comparison")


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_word_similarities_equal_the_papers_formula(losses: ModuleType) -> None:
    regions, words = _normal(2, 5, 8), _normal(3, 4, 8, seed=1)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    found = losses.word_similarities(regions, words, mask)
    for image in range(2):
        for caption in range(3):
            own = words[caption][mask[caption]]
            preferred = (regions[image] @ own.T).softmax(dim=1)  # of the words, for each region: equation 8
            attention = (losses.REGION_GAMMA * preferred).softmax(dim=0)  # of the regions, for each word: equation 9
            cosines = F.cosine_similarity(attention.T @ regions[image], own, dim=1)
            expected = math.log(sum(math.exp(losses.WORD_GAMMA * float(one)) for one in cosines))  # equation 10
            assert float(found[image, caption]) == pytest.approx(expected, abs=1e-5)


def test_pairs_with_an_equal_caption_are_no_mistakes(losses: ModuleType) -> None:
    similarities = _normal(4, 4)
    distinct = losses.matching_loss(similarities, torch.arange(4))
    expected = F.cross_entropy(10 * similarities, torch.arange(4)) + F.cross_entropy(
        10 * similarities.T, torch.arange(4)
    )
    assert float(distinct) == pytest.approx(float(expected))
    alike = losses.matching_loss(similarities, torch.tensor([0, 1, 0, 2]))
    similarities[0, 2] = similarities[2, 0] = 1e4  # those that are left out may have any value
    assert float(losses.matching_loss(similarities, torch.tensor([0, 1, 0, 2]))) == pytest.approx(float(alike))


def test_discriminator_loss_weighs_real_generated_and_wrong(losses: ModuleType) -> None:
    class Stub:
        """Images are their own features; logits are numbers."""

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def logits(self, features: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
            return (features * sentences).sum(1)

        def unconditional_logits(self, features: torch.Tensor) -> torch.Tensor:
            return features.sum(1)

    real, generated, sentences = _normal(3, 2), _normal(3, 2, seed=1), _normal(3, 2, seed=2)

    def real_loss(logits: torch.Tensor) -> float:
        return float(F.softplus(-logits).mean())

    def fake_loss(logits: torch.Tensor) -> float:
        return float(F.softplus(logits).mean())

    expected = (real_loss(real.sum(1)) + real_loss((real * sentences).sum(1))) / 2
    expected += (fake_loss(generated.sum(1)) + fake_loss((generated * sentences).sum(1))) / 3
    expected += fake_loss((real[:-1] * sentences[1:]).sum(1)) / 3
    assert float(losses.discriminator_loss(Stub(), real, generated, sentences)) == pytest.approx(expected)
    deceived = real_loss(generated.sum(1)) + real_loss((generated * sentences).sum(1))
    assert float(losses.generator_loss(Stub(), generated, sentences)) == pytest.approx(deceived)


def test_positions_attend_to_words_and_never_to_padding(networks: ModuleType) -> None:
    attention = networks.WordAttention(6, width=8)
    hidden, words = _normal(2, 6, 3, 3), _normal(2, 4, 8, seed=1)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    seen, weights = attention(hidden, words, mask)
    assert seen.shape == hidden.shape
    assert weights.sum(dim=2).allclose(torch.ones(2, 9))
    assert weights[1, :, 2:].eq(0).all()
    other = words.clone()
    other[1, 2:] = 9
    assert torch.equal(attention(hidden, other, mask)[0][1], seen[1])
    keys = attention.project(words[0])
    position = hidden[0, :, 1, 2]
    assert seen[0, :, 1, 2].allclose((keys @ position).softmax(0) @ keys, atol=1e-6)


def test_words_are_tokens_without_ends(attngan: ModuleType) -> None:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=256)
    words = attngan.words_of(tokenizer, [*CAPTIONS, ""], 12)
    assert words.shape == (3, 12)
    for row, caption in zip(words.tolist(), CAPTIONS, strict=False):
        inner = [token for token in tokenizer.encode([caption], 32).tokens[0].tolist() if token > 2]
        assert row == inner + [tokenizer.pad_id] * (12 - len(inner))
    assert (words[2] != tokenizer.pad_id).sum() == 1  # an LSTM needs a word


def test_training_goes_on_where_it_was_stopped(
    attngan: ModuleType, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, stopped after the first and resumed, give the losses and weights of an undisturbed training."""
    pairs = load_pairs(pairs_folder).train
    monkeypatch.setattr(attngan, "MATCHING_BATCH", 4)
    monkeypatch.setattr(attngan, "GAN_BATCH", 4)
    tokenizer = train_tokenizer([pair.captions[0] for pair in pairs], vocab_size=256)
    data = attngan.training_set(pairs, tokenizer, 30)
    torch.manual_seed(0)
    model = attngan.AttnGan(tokenizer, 30, channels=8)
    undisturbed, resumed = attngan._Gan(copy.deepcopy(model), 1), attngan._Gan(model, 1)
    undisturbed.train_step(data)
    undisturbed.save(tmp_path / "gan.pt", 5.0)
    undisturbed.train_step(data)
    assert resumed.restore(tmp_path / "gan.pt") == 5.0
    resumed.train_step(data)
    assert resumed.losses == undisturbed.losses
    for one, other in zip(resumed.average.parameters(), undisturbed.average.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_of_no_minutes_is_one_step_of_each(
    attngan: ModuleType, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attngan, "GAN_BATCH", 4)
    pairs = load_pairs(pairs_folder).train
    model, record = attngan.train_attngan(tmp_path, pairs, minutes=0.0, channels=8)
    assert (record["matching"]["steps"], record["gan"]["steps"]) == (1, 1)
    assert record["processor_minutes"] > 0
    again, stored = attngan.train_attngan(tmp_path, pairs, minutes=0.0, channels=8)
    assert stored == json.loads(json.dumps(record))
    caption = pairs[0].captions[0]
    images = again.generate([caption] * 3, seed=1)
    assert torch.equal(images, model.generate([caption] * 3, seed=1))
    assert images.shape == (3, 64, 64, 3)
    assert not torch.equal(images[0], images[1])
    assert len(again.scores(caption, images)) == 3
    _, longer = attngan.train_attngan(tmp_path, pairs, minutes=record["processor_minutes"] + 1e-9, channels=8)
    assert longer["gan"]["steps"] > 1
    assert longer["matching"] == record["matching"]


def test_figures_are_of_the_first_candidates_and_of_the_rankers_choice(
    comparison: ModuleType, pairs_folder: Path
) -> None:
    """Two candidates a caption are ranked; the set for distances has as many as the caption has photographs."""
    pairs = load_pairs(pairs_folder)
    held = pairs.validation
    photographs = Namespace(
        run=comparison.EvaluationRun(torch.device("cpu"), 7, 32, lambda *_: None), held=held, chosen=held[:2],
        needed=comparison.Counter({held[0].captions[0]: 3}), candidates=2,
        reader=comparison.ImageReader(None, None, None), real=[],
        encoder=Namespace(encode=lambda batches: torch.zeros(sum(map(len, batches)), 4)),
        distance_encoder=Namespace(encode=lambda batches: list(map(len, batches))),
        features=None,
    )  # fmt: skip
    requested: list[tuple[str, int]] = []

    def generate(caption: str, count: int, seed: int) -> Any:
        requested.append((caption, count))
        assert seed == 7
        return comparison.Candidates(
            np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 64, 64, 3), np.uint8),
            list(range(count)),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "joined", lambda parts: parts)
        patch.setattr(comparison, "feature_distances", lambda real, other, seed: other)
        row, shown = comparison.Photographs.figures(photographs, generate)
    assert requested == [(held[0].captions[0], 3), (held[1].captions[0], 2)]
    assert row["images"] == 5
    assert row["distances"] == [[3]]  # the second caption is in no set
    assert [np.asarray(image)[0, 0, 0] for image in shown] == [1, 1]  # the best-scored of the first two


def test_nothing_of_the_product_imports_the_baselines() -> None:
    for package in ("engine", "serve", "kernels"):
        for file in (REPOSITORY / package).rglob("*.py"):
            assert "baselines" not in file.read_text(encoding="utf-8"), file
