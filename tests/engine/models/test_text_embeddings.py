import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM, RobertaModel

from engine.config.transformer import TransformerConfig
from engine.errors import InputError
from engine.models.text_embeddings import TextTables, apply_text_tables, load_text_tables
from engine.models.transformer import KoDalle


def _roberta_config() -> RobertaConfig:
    return RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=12,
    )


def _model(**changes: int) -> KoDalle:
    sizes = {
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 8,
        "text_vocab_size": 40,
        "text_seq_len": 6,
        "text_position_rows": 12,
        "image_vocab_size": 9,
        "image_grid_size": 2,
    }
    return KoDalle(TransformerConfig(**(sizes | changes)))


@pytest.mark.parametrize("kind", [RobertaModel, RobertaForMaskedLM])
def test_roberta_tables_are_read_and_kept_whole(tmp_path: Path, kind: type) -> None:
    roberta = kind(_roberta_config())
    roberta.save_pretrained(tmp_path)
    tables = load_text_tables(tmp_path)
    embeddings = roberta.base_model.embeddings
    assert torch.equal(tables.tokens, embeddings.word_embeddings.weight)
    assert torch.equal(tables.positions, embeddings.position_embeddings.weight)

    model = _model()
    apply_text_tables(model, tables)
    text = torch.tensor([[0, 7, 8, 2, 1, 1]])
    expected = tables.tokens[[0, 0, 7, 8, 2, 1, 1]] + tables.positions[:7]  # <bos> at row 0
    assert torch.equal(model.text_embedding(text)[0], expected)


def test_gpt2_in_several_files(tmp_path: Path) -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    gpt.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tables = load_text_tables(str(tmp_path))
    assert torch.equal(tables.tokens, gpt.transformer.wte.weight)
    assert torch.equal(tables.positions, gpt.transformer.wpe.weight)


@pytest.mark.parametrize(
    ("changes", "field", "number"),
    [
        ({"dim": 32}, "model.dim", "16"),
        ({"text_vocab_size": 41}, "model.text_vocab_size", "40"),
        ({"text_position_rows": 514}, "model.text_position_rows", "12"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, int], field: str, number: str) -> None:
    tables = TextTables(torch.zeros(40, 16), torch.zeros(12, 16))
    with pytest.raises(InputError, match=f"{field}: .*set {field} to {number}"):
        apply_text_tables(_model(**changes), tables)


def test_missing_weights_and_missing_tables_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_text_tables(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="pickled weights are not read"):
        load_text_tables(tmp_path)
    save_file({"embeddings.word_embeddings.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"position_embeddings\.weight.*has none"):
        load_text_tables(tmp_path)
    index = {"weight_map": {"wte.weight": "gone.safetensors", "wpe.weight": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"gone\.safetensors, which is missing"):
        load_text_tables(tmp_path)


def test_a_name_without_network_is_an_input_error() -> None:
    with pytest.raises(InputError, match="pretrained_text_embeddings: no-such-organisation/no-such-model"):
        load_text_tables("no-such-organisation/no-such-model", local_files_only=True)
