"""Training on from a model: the same weights at the start, tables that grow, tokenizers that keep their numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config.codec import VqganConfig
from engine.config.ranker import KoclipConfig
from engine.config.run import TextConfig
from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import extend_tokenizer, load_tokenizer, tokenizer_for, train_tokenizer
from engine.errors import InputError
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from engine.training.start_from import start_from
from tests.conftest import KOCLIP, TRANSFORMER, VQGAN

Tree = dict[str, Any]


def test_a_grown_transformer_computes_the_same(kodalle_run: Path) -> None:
    """The logits of old entries are those of the model that it starts from."""
    folder = kodalle_run / "model"
    old, new = (KoDalle(TransformerConfig(**TRANSFORMER | {"text_vocab_size": entries})) for entries in (64, 80))
    start_from(old, old.config, folder, "transformer")
    fresh = new.text_embedding.tokens[64:].clone()
    start_from(new, new.config, folder, "transformer")
    assert torch.equal(new.text_embedding.tokens[64:], fresh)  # as initialised
    assert torch.equal(
        old.text_embedding.tokens, load_file(folder / "transformer.safetensors")["text_embedding.tokens"]
    )
    text, image = torch.randint(64, (2, 12)), torch.randint(32, (2, 64))
    with torch.no_grad():
        (old_text, old_image), (new_text, new_image) = (model.eval().logits(text, image) for model in (old, new))
    torch.testing.assert_close(new_image, old_image)
    torch.testing.assert_close(new_text[..., :64], old_text[..., :64])
    torch.testing.assert_close(new_text[..., 80:], old_text[..., 64:])  # the reserved rows


def test_a_grown_ranker_scores_the_same(koclip_run: Path) -> None:
    folder = koclip_run / "model"
    old, new = (KoClip(KoclipConfig(**KOCLIP | {"text_vocab_size": entries})) for entries in (64, 80))
    for model in (old, new):
        start_from(model, model.config, folder, "koclip")
    images, text = torch.rand(2, 3, 32, 32), torch.randint(64, (3, 12))
    torch.testing.assert_close(new.eval().similarity(images, text), old.eval().similarity(images, text))


def test_convolutions_go_on_at_another_image_size(vqgan_run: Path, koclip_run: Path) -> None:
    """A codec's tokens of a patch, and a ranker's scores of resized images, stay what they were at the old size."""
    small, large = (Vqgan(VqganConfig(**VQGAN | {"image_size": size})) for size in (32, 64))
    for model in (small, large):
        start_from(model, model.config, vqgan_run / "model", "vqgan")
    assert all(
        torch.equal(one, other)
        for one, other in zip(small.state_dict().values(), large.state_dict().values(), strict=True)
    )
    assert large.encode(torch.rand(1, 3, 64, 64)).shape == (1, 4 * small.config.image_seq_len)
    ranker = KoClip(KoclipConfig(**KOCLIP | {"image_size": 64}))
    start_from(ranker, ranker.config, koclip_run / "model", "koclip")


def test_attention_keeps_its_image_size(vqgan_run: Path) -> None:
    config = VqganConfig(**VQGAN | {"image_size": 64, "attention_resolutions": [8]})
    with pytest.raises(InputError, match=r"model.image_size is 64, there 32; .*attention_resolutions"):
        start_from(Vqgan(config), config, vqgan_run / "model", "vqgan")


def test_other_sizes_are_named(kodalle_run: Path) -> None:
    model = KoDalle(TransformerConfig(**TRANSFORMER | {"dim": 64, "num_layers": 1}))
    with pytest.raises(
        InputError, match=r"start_from: .*\(model.dim is 64, there 32; model.num_layers is 1, there 2\)"
    ):
        start_from(model, model.config, kodalle_run / "model", "transformer")


def test_new_words_become_entries_and_old_ones_keep_theirs() -> None:
    base = train_tokenizer(["a red square", "a blue circle"], vocab_size=60)
    new = extend_tokenizer(base, ["a crimson square", "a crimson star"], vocab_size=base.vocab_size + 1)
    assert new.extends(base)
    assert not base.extends(new)
    assert new.vocab_size == base.vocab_size + 1  # the commonest of the two
    assert new.encode(["a red square"], 8).tokens.tolist() == base.encode(["a red square"], 8).tokens.tolist()
    tokens = new.encode(["a crimson square"], 8).tokens[0].tolist()
    assert tokens[2] == base.vocab_size
    assert new.decode(tokens) == "a crimson square"
    assert (new.pad_id, new.end_ids, new.special_ids) == (base.pad_id, base.end_ids, base.special_ids)


def test_an_extended_tokenizer_survives_its_folder(tmp_path: Path) -> None:
    base = train_tokenizer(["a red square"], vocab_size=60)
    new = extend_tokenizer(base, ["a crimson square"], vocab_size=99)
    new.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).digest == new.digest


def test_a_tokenizer_with_other_numbers_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["a red square"], vocab_size=60).save(tmp_path / "old")
    train_tokenizer(["another caption of many letters"], vocab_size=60).save(tmp_path / "other")
    text = TextConfig(tokenizer=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"text.tokenizer: .*other: numbers the entries of .*old otherwise"):
        tokenizer_for(text, [], table_rows=99, start_from=tmp_path / "old")


@pytest.mark.parametrize("stage", ["vqgan", "dvae", "koclip", "kodalle"])
def test_a_run_starts_where_the_other_ended(
    stage: str,
    run_of: dict[str, Path],
    tree_of: Callable[..., Tree],
    train_tree: Callable[[Tree], Path],
    tmp_path: Path,
) -> None:
    """At a learning rate of 0 the exported weights are those that it started from."""
    folder = run_of[stage] / "model"
    tree = tree_of(stage, tmp_path / "run", start_from=str(folder))
    tree["loop"] |= {"steps": 1}
    tree["deepspeed"]["optimizer"]["params"] |= {"lr": 0.0, "weight_decay": 0.0}
    tree["deepspeed"].pop("scheduler", None)
    tree.pop("codebook_reset", None)
    if stage == "koclip":
        tree["encoder_lr_ratio"] = 1.0
    name = {"kodalle": "transformer", "dvae": "vqgan"}.get(stage, stage)
    ours, theirs = (load_file(path / f"{name}.safetensors") for path in (train_tree(tree), folder))
    different = [
        key
        for key in theirs
        if not torch.equal(ours[key], theirs[key]) and "running_" not in key and "num_batches" not in key
    ]
    assert not different
