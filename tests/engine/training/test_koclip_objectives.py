"""KoCLIP's training with all options of similarity and loss: batches, resumption, what the folder holds, what is refused."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.config.stages import KoclipLossConfig
from engine.config_files import load_run
from engine.data.order import BatchOrder
from engine.data.pairs import load_pairs
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.data.tokenizer_files import SpecialTokens
from engine.errors import InputError
from engine.models.folder import expected_shapes, load_part
from engine.models.koclip import KoClip
from engine.training.batches import Batch, Images, captioned_image_source
from engine.training.objective_batches import objective_source
from engine.training.process_group import join_world
from engine.training.stage_koclip import KoclipStage
from tests.engine.training.test_resuming import stop_after
from tests.engine.training.test_trainer import Losses, Same, Train, Tree

LOSS = {
    "decoupled": True, "image_ssl": "simsiam", "image_ssl_weight": 0.3, "image_ssl_dim": 8, "image_ssl_hidden_dim": 12,
    "masked_language_weight": 0.2,
}  # fmt: skip
MakeTree = Callable[..., Tree]


def _tree(run_tree: MakeTree, run: Path, **loss: Any) -> Tree:
    tree = run_tree("koclip", run, loss=LOSS | loss)
    tree["model"] = tree["model"] | {"token_similarity": True, "direction_projections": True}
    return tree


@pytest.mark.exclusive  # bits are compared: no thread of another test's server may run beside
@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_the_folder_holds_a_koclip_alone(
    run_tree: MakeTree,
    train_tree: Train,
    losses: Losses,
    same_weights: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = _tree(run_tree, tmp_path / "whole")
    train_tree(whole)
    stopped = _tree(run_tree, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        stop_after(patched, "koclip", 3)
        with pytest.raises(SystemExit) as end:
            train_tree(stopped)
    assert end.value.code == 128 + signal.SIGTERM
    torch.manual_seed(99)
    model = train_tree(stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    same_weights(model, tmp_path / "whole" / "model")
    steps = [line for line in losses(tmp_path / "whole") if "loss" in line]
    for line in steps:
        parts = 0.5 * line["loss_contrastive"] + 0.3 * line["loss_image_ssl"] + 0.2 * line["loss_masked_language"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    assert len(steps) == 8
    ranker: KoClip = load_part(model, "koclip")  # refuses missing and extra tensors
    assert ranker.config.token_similarity
    assert set(expected_shapes("koclip", ranker.config)) == set(ranker.state_dict())


def test_the_decoupled_loss_is_what_is_trained_and_validated(
    koclip_run: Path, run_tree: MakeTree, train_tree: Train, losses: Losses, tmp_path: Path
) -> None:
    """Of the same batches and weights: without the pair in its denominator every loss is lower, from the first step on."""
    train_tree(run_tree("koclip", tmp_path / "run", loss={"decoupled": True}))
    for name in ("loss", "validation_loss"):
        found, plain = ([line[name] for line in losses(run) if name in line] for run in (tmp_path / "run", koclip_run))
        assert found[0] < plain[0] - 0.1


def _batches(pairs_folder: Path, batch_size: int, rank: int, ranks: int, **loss: Any) -> list[Batch]:
    pairs = load_pairs(pairs_folder).train
    tokenizer = train_tokenizer((caption for pair in pairs for caption in pair.captions), vocab_size=60)
    order = BatchOrder(len(pairs), batch_size, seed=3, rank=rank, world_size=ranks)
    images = Images(pairs, 32, cache=True)
    source = captioned_image_source(images, pairs, order, tokenizer, 12, flip=True)
    if loss:
        source = objective_source(source, images, order, tokenizer, KoclipLossConfig(**loss))
    return [source(number) for number in range(3)]


def test_ranks_share_the_batch_of_one_and_the_rest_of_it_is_as_without(pairs_folder: Path) -> None:
    both = {"image_ssl": "simclr", "masked_language_weight": 0.1}
    one, plain = _batches(pairs_folder, 6, 0, 1, **both), _batches(pairs_folder, 6, 0, 1)
    halves = [_batches(pairs_folder, 3, rank, 2, **both) for rank in range(2)]
    for number, batch in enumerate(one):
        assert batch["views"].shape == (6, 2, 3, 32, 32)
        assert batch["masked_positions"].shape == batch["masked_originals"].shape == (6, 2)
        assert batch.keys() - plain[number].keys() == {
            "views",
            *(f"masked_{n}" for n in ("tokens", "positions", "originals")),
        }
        for name, tensor in batch.items():
            assert torch.equal(torch.cat([half[number][name] for half in halves]), tensor), name
            assert name not in plain[number] or torch.equal(plain[number][name], tensor), name
        masked = batch["masked_originals"] >= 0
        own = batch["text_tokens"].gather(1, batch["masked_positions"])
        assert masked.any(dim=1).all()
        assert torch.equal(own[masked], batch["masked_originals"][masked])
        assert (batch["views"][:, 0] != batch["views"][:, 1]).flatten(1).any(dim=1).all()
    assert not torch.equal(one[0]["views"], one[1]["views"])


def test_what_cannot_be_trained_is_refused(
    run_tree: MakeTree, write_tree: Callable[..., Path], pairs_folder: Path, tmp_path: Path
) -> None:
    def load(**more: Any) -> Any:
        return load_run(write_tree(_tree(run_tree, tmp_path / "run") | more, tmp_path / "run.yaml"))

    with pytest.raises(InputError, match="leave nothing for the pairs: lower them"):
        load(loss={"image_ssl": "simclr", "image_ssl_weight": 0.6, "masked_language_weight": 0.4})
    with pytest.raises(InputError, match="image_encoder_lr_ratio 0 freezes it"):
        load(image_encoder_lr_ratio=0)
    run = load()
    alone = run.model_copy(update={"deepspeed": run.deepspeed | {"train_micro_batch_size_per_gpu": 1}})
    with pytest.raises(InputError, match=r"loss\.image_ssl compares images: give 2 or more"):
        KoclipStage(alone, join_world(torch_threads=None))
    pairs = load_pairs(pairs_folder).train
    backend = Tokenizer.from_str(train_tokenizer(["빨강"], vocab_size=60).to_json())
    unmasked = CaptionTokenizer(backend, SpecialTokens(pad_token="[PAD]"))
    with pytest.raises(InputError, match=r"loss\.masked_language_weight: 0\.2: needs a tokenizer"):
        objective_source(lambda _: {}, Images(pairs, 32, cache=False), BatchOrder(4, 2, seed=0), unmasked, run.loss)
