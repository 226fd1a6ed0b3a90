"""DALL-E's text recipe in real trainings: BPE with dropout, padding learned for each position, near-central crops."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config_files import parse_run
from engine.data.order import BatchOrder
from engine.data.pairs import load_pairs
from engine.data.tokenizer import load_tokenizer, train_bpe_tokenizer
from engine.errors import InputError
from engine.models.folder import load_part
from engine.pipeline.pipeline import Pipeline
from engine.training.batches import Images, captioned_image_source
from engine.training.process_group import join_world
from engine.training.stage_koclip import KoclipStage
from engine.training.stage_kodalle import KodalleStage
from engine.training.stage_vqgan import VqganStage
from tests.conftest import TRANSFORMER
from tests.engine.training.test_resuming import stop_after
from tests.engine.training.test_trainer import Losses, Same, Train, Tree, TreeOf

TEXT = {"tokenizer": "train-bpe", "vocab_size": 300, "lowercase": True, "bpe_dropout": 0.3}
MODEL = {"text_vocab_size": 300, "unique_padding": True, "padding_token": 1}


@pytest.fixture(scope="module")
def photos(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's pairs as photographs of 44 x 36, one of them too long to be cropped."""
    folder = tmp_path_factory.mktemp("photos") / "pairs"
    shutil.copytree(pairs_folder, folder)
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        Image.open(path).resize((44, 36) if number else (90, 36)).save(path)
    return folder


@pytest.fixture(scope="module")
def recipe(tree_of: TreeOf, photos: Path) -> Callable[[Path], Tree]:
    def make(run: Path) -> Tree:
        tree = tree_of("kodalle", run, text=TEXT, koclip=None, augmented_views=2)
        tree["model"] = TRANSFORMER | MODEL
        tree["data"] = {"pairs": str(photos), "crop": "dalle"}
        return tree

    return make


@pytest.fixture(scope="module")
def trained(recipe: Callable[[Path], Tree], train_tree: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("recipe") / "run"
    train_tree(recipe(run))
    return run


@pytest.mark.exclusive  # bits are compared: no thread of another test's server may run beside
def test_resumed_equals_uninterrupted(
    trained: Path, recipe: Callable[[Path], Tree], train_tree: Train, losses: Losses, same_weights: Same, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patched:
        stop_after(patched, "kodalle", 3)
        with pytest.raises(SystemExit):
            train_tree(recipe(tmp_path / "run"))
    assert "note: data.crop dalle leaves out 1 of 30 images, the first: 00 is 90 x 36" in capsys.readouterr().out
    train_tree(recipe(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(trained)
    same_weights(tmp_path / "run" / "model", trained / "model")
    changed = recipe(tmp_path / "run")
    changed["text"] = TEXT | {"bpe_dropout": 0.1}
    with pytest.raises(InputError, match=r"text.bpe_dropout: 0.1: .* was started with 0.3"):
        train_tree(changed)


def test_the_exported_folder_generates_and_counts_tokens(trained: Path) -> None:
    pipeline = Pipeline.from_pretrained(trained / "model")
    (generation,) = pipeline(["빨강 바탕에 OOTD 네모"], candidates=2, seed=5)
    assert [candidate.image.size for candidate in generation.candidates] == [(32, 32)] * 2
    assert pipeline.tokenizer.decode(generation.request.text_tokens[0].tolist()) == "빨강 바탕에 ootd 네모"
    assert np.array_equal(
        pipeline.tokenizer.encode(["ootd"], 12).tokens, pipeline.tokenizer.encode(["OOTD"], 12).tokens
    )


def test_padding_is_learned_for_each_position(trained: Path) -> None:
    model = load_part(trained / "model", "transformer")
    tokenizer = load_tokenizer(str(trained / "model"))
    tokens = tokenizer.encode(["빨강"], 12).tokens
    numbered = model.text_embedding.numbered(tokens)
    padded = tokens[0] == tokenizer.pad_id
    assert numbered[0, padded].tolist() == [300 + place for place in range(12) if padded[place]]
    assert len(model.text_embedding.tokens) == 300 + 12
    losses = model(tokens, torch.zeros(1, 64, dtype=torch.int64))
    losses.loss.backward()
    gradient = model.text_embedding.tokens.grad
    assert all(gradient[300 + place].any() for place in range(12) if padded[place])


def test_dropout_is_in_training_alone_and_changes_nothing_else(recipe: Callable[[Path], Tree], tmp_path: Path) -> None:
    def stage(dropout: float, **more: Any) -> KodalleStage:
        tree = recipe(tmp_path / "run") | more
        tree["text"] = TEXT | {"bpe_dropout": dropout}
        return KodalleStage(parse_run(tree, source="test"), join_world(torch_threads=1))  # type: ignore[arg-type]

    with_dropout, without = stage(0.5), stage(0.0)
    assert (with_dropout.num_train, with_dropout.num_validation) == (23, 6)
    one, other = with_dropout.source(1), without.source(1)
    assert not torch.equal(one["text_tokens"], other["text_tokens"])
    assert {name for name in one if not torch.equal(one[name], other[name])} == {"text_tokens"}
    for ours, plain in zip(one["text_tokens"].tolist(), other["text_tokens"].tolist(), strict=True):
        if 1 in ours:  # not cut
            assert with_dropout.tokenizer.decode(ours) == without.tokenizer.decode(plain)
    for source in ("validation_source", "_sample_source"):
        assert torch.equal(getattr(with_dropout, source)(0)["text_tokens"], getattr(without, source)(0)["text_tokens"])
    plain_data = {"pairs": str(tmp_path / "alone"), "crop": "dalle"}
    shutil.copytree(recipe(tmp_path)["data"]["pairs"], tmp_path / "alone")
    lines = (tmp_path / "alone" / "pairs.jsonl").read_text(encoding="utf-8").replace('"validation"', '"train"')
    (tmp_path / "alone" / "pairs.jsonl").write_text(lines, encoding="utf-8")
    samples = [stage(rate, data=plain_data, run=str(tmp_path / "other"))._sample_source(0) for rate in (0.5, 0.0)]
    assert torch.equal(samples[0]["text_tokens"], samples[1]["text_tokens"])


def test_koclip_drops_merges_and_nothing_else(pairs_folder: Path) -> None:
    pairs = load_pairs(pairs_folder).train
    tokenizer = train_bpe_tokenizer([caption for pair in pairs for caption in pair.captions], vocab_size=300)
    order = BatchOrder(len(pairs), 6, seed=1)
    plain, dropped, again = (
        captioned_image_source(
            Images(pairs, 32, cache=False), pairs, order, tokenizer, 20, flip=True, shift=2,
            bpe_dropout=tokenizer.dropout(rate),
        )
        for rate in (0.0, 0.5, 0.5)
    )  # fmt: skip
    assert torch.equal(plain(3)["images"], dropped(3)["images"])
    assert not torch.equal(plain(3)["text_tokens"], dropped(3)["text_tokens"])
    assert torch.equal(dropped(3)["text_tokens"], again(3)["text_tokens"])
    for ours, theirs in zip(dropped(3)["text_tokens"], plain(3)["text_tokens"], strict=True):
        assert tokenizer.decode(ours.tolist()) == tokenizer.decode(theirs.tolist())


def test_wrong_captions_are_cut_like_the_right_ones(pairs_folder: Path) -> None:
    """Were they left whole, a ranker could tell them from right ones by that alone."""

    class Wrong:
        def sample(self, caption: str, generator: np.random.Generator) -> str:
            return caption

    pairs = load_pairs(pairs_folder).train
    tokenizer = train_bpe_tokenizer([caption for pair in pairs for caption in pair.captions], vocab_size=300)
    source = captioned_image_source(
        Images(pairs, 32, cache=False), pairs, BatchOrder(len(pairs), 6, seed=1), tokenizer, 20, flip=False,
        bpe_dropout=tokenizer.dropout(0.5), wrong=Wrong(), num_wrong=2,  # type: ignore[arg-type]
    )  # fmt: skip
    batch = source(0)
    assert batch["wrong_text_tokens"].shape == (6, 2, 20)
    lengths = [int((batch[name] != tokenizer.pad_id).sum()) / copies
               for name, copies in (("text_tokens", 1), ("wrong_text_tokens", 2))]  # fmt: skip
    whole = sum(
        int((tokenizer.encode([tokenizer.decode(row.tolist())], 20).tokens != 1).sum()) for row in batch["text_tokens"]
    )
    assert min(lengths) > 1.2 * whole
    for rows, right in zip(batch["wrong_text_tokens"], batch["text_tokens"], strict=True):
        assert {tokenizer.decode(row.tolist()) for row in rows} == {tokenizer.decode(right.tolist())}


def test_codec_and_ranker_crop_too(tree_of: TreeOf, photos: Path, tmp_path: Path) -> None:
    for name, make in (("vqgan", VqganStage), ("koclip", KoclipStage)):
        tree = tree_of(name, tmp_path / name)
        tree["data"] = {"pairs": str(photos), "crop": "dalle"}
        stage = make(parse_run(tree, source="test"), join_world(torch_threads=1))  # type: ignore[arg-type]
        assert (stage.num_train, stage.num_validation) == (23, 6)
        assert stage.source(0)["images"].shape == (4, 3, 32, 32)
        assert stage.validation_source is not None
        assert torch.equal(stage.validation_source(0)["images"], stage.validation_source(0)["images"])


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("koclip", {"tokenizer": "train", "bpe_dropout": 0.1}, "bpe_dropout leaves out merges, and WordPiece has none"),
        ("koclip", {"tokenizer": "klue/roberta-base", "lowercase": True}, "lowercase is for train and train-bpe"),
        ("kodalle", TEXT | {"vocab_size": 40}, r"text.vocab_size: 40: train-bpe needs 262 at least"),
        ("kodalle", TEXT, r"pads with 1, and a model with unique_padding reads 0 as padding: .*padding_token: 1"),
    ],
)
def test_texts_that_cannot_be(stage: str, text: Tree, message: str, tree_of: TreeOf, tmp_path: Path) -> None:
    tree = tree_of(stage, tmp_path / "run", text=text)
    if stage == "kodalle":
        tree |= {"koclip": None, "model": TRANSFORMER | MODEL | {"padding_token": None}}
    with pytest.raises(InputError, match=message):
        KodalleStage(parse_run(tree, source="test"), join_world(torch_threads=1))  # type: ignore[arg-type]
