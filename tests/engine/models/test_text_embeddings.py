import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from engine.config.transformer import TransformerConfig
from engine.errors import InputError
from engine.models.text_embeddings import TextTables, apply_text_tables, load_text_tables
from engine.models.transformer import KoDalle
from engine.models.uninitialised import Uninitialised


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
    sizes: dict[str, int] = {
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
    assert tables.positions is not None
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
    assert tables.positions is not None
    assert torch.equal(tables.positions, gpt.transformer.wpe.weight)


def test_gpt2_tables_of_another_width_are_projected(tmp_path: Path) -> None:
    """KoGPT-Trinity's form: a GPT-2 wider than the transformer."""
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=2, n_positions=20))
    gpt.save_pretrained(tmp_path)
    tables = load_text_tables(tmp_path)
    model = _model(text_embedding_dim=24, text_position_rows=20, padding_token=3)
    apply_text_tables(model, tables)
    embedding, text = model.text_embedding, torch.tensor([[5, 7, 8, 2, 3, 3]])
    assert tables.positions is not None
    assert embedding.projection is not None
    summed = tables.tokens[[0, 5, 7, 8, 2, 3, 3]] + tables.positions[:7]
    torch.testing.assert_close(embedding(text)[0], summed @ embedding.projection.T)
    for position in (0, 4):
        token = [0, *text[0].tolist()][position]
        torch.testing.assert_close(embedding.at(torch.tensor([token]), position)[0], embedding(text)[0, position])
    # Rows of a smaller table keep their angles: the projection's rows are orthonormal.
    torch.testing.assert_close(embedding.projection @ embedding.projection.T, torch.eye(16))
    model(text, torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    gradient = embedding.tokens.grad
    assert gradient is not None
    assert [bool(gradient[token].any()) for token in (1, 3, 5)] == [False, False, True]  # 3 is padding, 1 not there
    assert embedding.positions is not None
    assert embedding.positions.grad is not None
    assert bool(embedding.positions.grad[1].any())  # row 1 is RoBERTa's padding, not GPT's


def test_gptj_has_no_position_table(tmp_path: Path) -> None:
    """KoGPT's form: GPT-J, in 16 bits as published, whose positions are rotary."""
    gpt = GPTJForCausalLM(
        GPTJConfig(vocab_size=40, n_embd=24, n_layer=1, n_head=2, n_positions=20, rotary_dim=4)
    ).half()
    gpt.save_pretrained(tmp_path)
    tables = load_text_tables(tmp_path)
    assert tables.positions is None
    assert torch.equal(tables.tokens, gpt.transformer.wte.weight.float())
    model = _model(text_embedding_dim=24)
    apply_text_tables(model, tables)
    positions = model.text_embedding.positions
    assert positions is not None
    assert torch.equal(model.text_embedding.tokens, tables.tokens)
    assert 0.5 < float((positions.std() / tables.tokens.std()).detach()) < 2
    wider = _model()  # and a smaller one into a wider model
    narrow = KoDalle(wider.config.model_copy(update={"text_embedding_dim": 8})).text_embedding.projection
    assert narrow is not None
    torch.testing.assert_close(narrow.T @ narrow, 2 * torch.eye(8))


def test_tables_beside_unique_padding(tmp_path: Path) -> None:
    model = _model(unique_padding=True, padding_token=1)
    before = model.text_embedding.tokens[40:].clone()
    apply_text_tables(model, TextTables(torch.ones(40, 16), torch.zeros(12, 16)))
    assert bool(model.text_embedding.tokens[:40].eq(1).all())
    assert torch.equal(model.text_embedding.tokens[40:], before)


@pytest.mark.parametrize(
    ("entries", "width", "position_rows", "expected"),
    [
        (32_000, None, 514, 334_974_336),  # klue/roberta-large, the published count
        (51_200, 1_920, 1_024, 423_596_160),  # KoGPT-Trinity
        (64_512, 4_096, 129, 603_968_640),  # KoGPT
    ],
)
def test_parameters_at_the_published_sizes(entries: int, width: int | None, position_rows: int, expected: int) -> None:
    config = TransformerConfig(text_vocab_size=entries, text_embedding_dim=width, text_position_rows=position_rows)
    with torch.device("meta"), Uninitialised():
        found = sum(parameter.numel() for parameter in KoDalle(config).parameters())
    W, C, layers, images = width or 1_024, 1_024, 16 * 14_696_448, 16_384 * 1_024 + 2 * 16 * 1_024
    text = (entries + position_rows) * W + (0 if width is None else W * C)
    head = 2 * C + (entries + 128 + 16_384) * (C + 1)
    assert found == text + images + layers + head == expected


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
