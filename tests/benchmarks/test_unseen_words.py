"""What the comparison of vocabularies is made of: captions in other words, the language model's folder cut down, losses."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.transformer import TransformerConfig
from engine.config_files import load_run
from engine.data.pairs import Pair, Pairs
from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.models.transformer import KoDalle
from tests.benchmark_scripts import run_script
from tests.paths import REPOSITORY

CAPTION = "상의에서 색상은 스카이블루이다. 상의에서 카테고리는 후드티이다. 상의에서 소매기장은 긴팔이다."
OTHER = "상의에서 색상은 하늘색이다. 상의에서 카테고리는 후디이다. 상의에서 소매기장은 긴팔이다."
PAIRS = Pairs((Pair("1", Path("1.png"), (CAPTION,), "1", "train"),))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("unseen_words")


def test_every_variant_is_a_config_of_its_own(script: ModuleType) -> None:
    runs = set()
    for changes in script.VARIANTS.values():
        values = [f"{name}={str(value).strip('{}')}" for name, value in (script.SMALL | changes).items()]
        runs.add(load_run(REPOSITORY / "configs/clothing/kodalle-bpe.yaml", values).model_dump_json())
    assert len(runs) == len(script.VARIANTS)


def test_values_are_rewritten_and_nothing_else(script: ModuleType) -> None:
    assert script.rewritten(CAPTION) == OTHER
    assert script.rewritten(OTHER) == OTHER
    script.check_unseen(PAIRS, [OTHER])
    with pytest.raises(SystemExit, match="하늘색"):
        script.check_unseen(Pairs((Pair("1", Path("1.png"), (OTHER,), "1", "train"),)), [OTHER])


def test_a_trimmed_language_model_has_the_same_tokens_and_vectors(script: ModuleType, tmp_path: Path) -> None:
    whole = train_tokenizer([CAPTION, OTHER, "여친 룩 OOTD 쿨 톤 고급 스러운", "다른 말 많이"], vocab_size=200)
    whole.save(tmp_path / "whole")
    table = torch.randn(whole.vocab_size, 6)
    names = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    save_file({names[0]: table, names[1]: torch.zeros(4, 6)}, tmp_path / "whole" / "model.safetensors")
    captions = {"labelled": [CAPTION], "rewritten": [OTHER]}
    folder = script.trim(tmp_path / "whole", PAIRS, captions, tmp_path / "trimmed")
    trimmed, rows = load_tokenizer(str(folder)), load_file(folder / "model.safetensors")[names[0]]
    assert len(rows) == trimmed.vocab_size < whole.vocab_size
    for caption in (CAPTION, OTHER):
        ours, theirs = (tokenizer.encode([caption], 40).tokens[0] for tokenizer in (trimmed, whole))
        assert trimmed.decode(ours.tolist()) == whole.decode(theirs.tolist())
        assert torch.equal(rows[ours], table[theirs])
    dealt = load_file(script.dealt_out(folder) / "model.safetensors")[names[0]]
    assert not torch.equal(dealt, rows)
    assert torch.equal(dealt.sum(1).sort().values, rows.sum(1).sort().values)


def test_losses_are_the_models(script: ModuleType) -> None:
    tokenizer = train_tokenizer([CAPTION], vocab_size=60)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "text_vocab_size": 60, "text_seq_len": 20}
    config = TransformerConfig(
        **sizes, text_position_rows=21, image_vocab_size=9, image_grid_size=2, unique_padding=True, padding_token=1
    )
    model, images = KoDalle(config), torch.randint(9, (40, 4), generator=torch.Generator().manual_seed(0))
    texts = tokenizer.encode([CAPTION] * 40, 20).tokens
    with torch.no_grad():
        losses = script.image_losses(model, tokenizer, [CAPTION] * 40, images)
        assert losses.shape == (40,)
        torch.testing.assert_close(losses.mean(), model(texts, images).loss_image)


def test_a_mean_over_seeds_is_of_losses(script: ModuleType) -> None:
    """Not of ratios: a seed whose captions are worth little would count as much as the others."""
    rows = [
        {"loss_image": {"labelled": 3.0, "rewritten": 3.5, "without": 4.0}, "kept": 0.5},
        {"loss_image": {"labelled": 3.8, "rewritten": 4.0, "without": 4.0}, "kept": 0.0},
    ]
    found = script.mean(rows)
    assert found["loss_image"] == pytest.approx({"labelled": 3.4, "rewritten": 3.75, "without": 4.0})
    assert found["kept"] == pytest.approx(0.25 / 0.6)
    assert found["kept_by_seed"] == [0.5, 0.0]


def test_a_missing_language_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    answer = run_script("language_model_table", str(tmp_path / "out"))
    assert answer.returncode == 2
    assert "kiwipiepy is not installed" in answer.stderr
    assert not (tmp_path / "out").exists()
