"""Batches are a function of their number, whichever process makes them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.caption_fit import CaptionFit
from engine.data.caption_grammar import Fact
from engine.data.kfashion.grammar import KFashionGrammar
from engine.data.order import BatchOrder
from engine.data.pairs import load_pairs
from engine.data.token_shards import TokenShard
from engine.data.tokenizer import train_tokenizer
from engine.data.wrong_captions import WrongCaptions
from engine.errors import InputError
from engine.training.batches import (
    Batch,
    BatchSource,
    Images,
    captioned_image_source,
    image_source,
    stream,
    token_source,
)


class SquareGrammar(KFashionGrammar):
    """`<ground> 바탕에 <square> 네모` states the colour of a square's ground; the shorter captions state nothing."""

    def facts(self, caption: str) -> list[Fact]:
        ground, found, square = caption.partition(" 바탕에 ")
        return [Fact(square, "ground", ground)] if found else []

    def write(self, facts: Sequence[Fact]) -> str:
        return " ".join(f"{fact.value} 바탕에 {fact.subject}" for fact in facts)

    def is_colour(self, attribute: str) -> bool:
        return attribute == "ground"


def _source(folder: Path, *, world_size: int = 1, rank: int = 0, cache: bool = False) -> BatchSource:
    pairs = load_pairs(folder).train
    tokenizer = train_tokenizer([caption for pair in pairs for caption in pair.captions], vocab_size=60)
    order = BatchOrder(len(pairs), 6 // world_size, seed=1, rank=rank, world_size=world_size)
    images, fit = Images(pairs, 32, cache=cache), CaptionFit(pairs)
    facts = [fact for pair in pairs for fact in SquareGrammar().facts(pair.captions[0])]
    wrong = WrongCaptions(SquareGrammar(), {fact[:2]: [other.value for other in facts] for fact in facts})
    return captioned_image_source(
        images, pairs, order, tokenizer, 12, flip=True, shift=3, fit=fit, wrong=wrong, num_wrong=2
    )


def _equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_cached_and_by_workers_are_the_same(pairs_folder: Path) -> None:
    whole = list(stream(_source(pairs_folder), 0, 6, num_workers=0))
    assert whole[0]["images"].shape == (6, 3, 32, 32)
    assert whole[0]["images"].dtype == torch.uint8
    assert whole[0]["wrong_text_tokens"].shape == (6, 2, 12)
    assert (
        not (whole[0]["wrong_text_tokens"] == whole[0]["text_tokens"][:, None]).all(dim=2)[whole[0]["has_wrong"]].any()
    )
    for other in (
        stream(_source(pairs_folder), 3, 6, num_workers=0),
        stream(_source(pairs_folder, cache=True), 3, 6, num_workers=0),
        stream(_source(pairs_folder), 3, 6, num_workers=2),
    ):
        assert all(_equal(one, two) for one, two in zip(whole[3:], other, strict=True))


def test_ranks_share_the_batch(pairs_folder: Path) -> None:
    whole = _source(pairs_folder)(4)
    halves = [_source(pairs_folder, world_size=2, rank=rank)(4) for rank in range(2)]
    assert _equal(whole, {name: torch.cat([half[name] for half in halves]) for name in whole})
    assert halves[1]["fits"].shape == (3, 6)
    assert halves[1]["fits"][:, 3:].diagonal().all()
    assert not whole["fits"].all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_with_and_without_workers(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "a.png").write_bytes(b"not a image")
    line = {"key": "a", "image": "a.png", "caption": "x", "photo": "a", "split": "train"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    pairs = load_pairs(tmp_path).train
    source = image_source(Images(pairs, 8, cache=False), BatchOrder(1, 1, seed=0), flip=False)
    with pytest.raises(InputError, match=r"a\.png"):
        list(stream(source, 0, 2, num_workers=num_workers))


def test_all_captions_of_a_pair_are_seen(pairs_folder: Path) -> None:
    """A caption is chosen at position + 2**63, whose randomness must still differ from visit to visit."""
    pairs = load_pairs(pairs_folder).train[:1]
    assert len(pairs[0].captions) == 2
    tokenizer = train_tokenizer(pairs[0].captions, vocab_size=60)
    order = BatchOrder(1, 64, seed=0)
    batch = captioned_image_source(Images(pairs, 8, cache=True), pairs, order, tokenizer, 12, flip=False)(0)
    first = tokenizer.encode([pairs[0].captions[0]], 12).tokens
    assert 16 <= int((batch["text_tokens"] == first).all(dim=1).sum()) <= 48


def _shift_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0])


@pytest.fixture
def gradient() -> Callable[..., Batch]:
    """A image whose red is its column and green its row, seen 200 times."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[..., 0] = np.arange(16)
    image[..., 1] = np.arange(16)[:, None]

    class _Images(Images):
        def __init__(self) -> None:
            pass

        def __getitem__(self, index: int) -> np.ndarray:
            return np.asarray(image[index])

        def random(self, index: int, generator: np.random.Generator) -> np.ndarray:
            return self[index]

    def make(**augmentation: bool | int) -> Batch:
        return image_source(_Images(), BatchOrder(1, 200, seed=0), **augmentation)(0)  # type: ignore[arg-type]

    return make


def test_flip_mirrors_half_of_the_visits(gradient: Callable[..., Batch]) -> None:
    images = gradient(flip=True)["images"]
    mirrored = images[:, 0, 0, 0] == 15
    assert 70 <= int(mirrored.sum()) <= 130
    assert torch.equal(images[mirrored].flip(-1), images[~mirrored][:1].expand(int(mirrored.sum()), -1, -1, -1))
    assert torch.equal(gradient(flip=False)["images"], images[~mirrored][:1].expand(200, -1, -1, -1))


def test_shift_moves_both_ways_and_repeats_edges(gradient: Callable[..., Batch]) -> None:
    images = gradient(flip=False, shift=2)["images"]
    corners = images[:, :2, 8, 8].int() - 8  # translation of the middle, right and down
    assert set(corners.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert int(images.max()) == 15


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 2), (1.0, 6)])
def test_spliced_images_have_a_rectangle_of_the_next_one(pairs_folder: Path, share: float, count: int) -> None:
    pairs = load_pairs(pairs_folder).train
    batch = image_source(Images(pairs, 32, cache=False), BatchOrder(len(pairs), 6, seed=1), flip=True, spliced=share)(0)
    assert ("spliced" in batch) == (count > 0)
    for number in range(count):
        spliced, own, other = batch["spliced"][number], batch["images"][number], batch["images"][(number + 1) % 6]
        assert ((spliced == own) | (spliced == other)).all(dim=0).all()
        assert not torch.equal(spliced, own)
    assert len(batch.get("spliced", ())) == count


def test_dropped_captions_are_the_empty_one() -> None:
    shard = TokenShard(np.arange(8, dtype=np.uint16).reshape(1, 1, 8), np.full((1, 3), 9, np.int32), np.array([0, 1]))
    empty = torch.tensor([[0, 2, 1]])
    order = BatchOrder(1, 400, seed=0)
    batch = token_source(shard, order, empty=empty, caption_dropout=0.25)(0)
    dropped = (batch["text_tokens"] == empty).all(dim=1)
    assert (dropped | (batch["text_tokens"] == 9).all(dim=1)).all()
    assert 65 <= int(dropped.sum()) <= 135
    assert batch["text_tokens"].dtype == batch["image_tokens"].dtype == torch.int64
    assert (
        not (token_source(shard, order, empty=empty, caption_dropout=0.0)(0)["text_tokens"] == empty).all(dim=1).any()
    )


def test_noise_is_on_the_inputs_and_not_on_the_targets() -> None:
    image = np.arange(100, dtype=np.uint16)
    shard = TokenShard(image.reshape(1, 1, 100), np.full((1, 3), 9, np.int32), np.array([0, 1]))
    order, empty = BatchOrder(1, 300, seed=0), torch.tensor([[0, 2, 1]])
    source = token_source(shard, order, empty=empty, input_token_noise=0.6, image_vocab_size=1000)
    batch = source(0)
    assert torch.equal(batch["image_tokens"], torch.arange(100).expand(300, -1))
    shares = (batch["noisy_image_tokens"] != batch["image_tokens"]).double().mean(dim=1)
    assert shares.max() <= 0.75  # uniform up to 0.6, and the scatter of a sample
    assert shares.min() <= 0.05
    assert shares.mean().item() == pytest.approx(0.3, abs=0.03)
    assert 100 <= int(batch["noisy_image_tokens"].max()) < 1000
    assert _equal(batch, source(0))
    assert "noisy_image_tokens" not in token_source(shard, order, empty=empty)(0)
