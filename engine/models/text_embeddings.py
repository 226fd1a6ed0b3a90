"""Token and position tables of a published language model, as the initial text embeddings of KoDALLE.

KoDALLE uses nothing else of klue/roberta-large: no layers, no LayerNorm, no token types. So only the two tables
are read, directly from the safetensors file (134 MB of the 1.3 GB; never a pickle, never code from the hub).

                          V        W       R        into a transformer of another width
    klue/roberta-large    32,000   1,024   514      fits KoDALLE's own: model.dim 1024
    KoGPT-Trinity 1.2B    51,200   1,920   1,024    GPT-2's form: model.text_embedding_dim 1920, projected
    KoGPT 6B              64,512   4,096   none     GPT-J's form, whose positions are rotary: 4096, positions start anew

V text vocabulary, W table width, R position rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import InputError
from engine.models.transformer import KoDalle

_FIELD = "pretrained_text_embeddings"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# BERT, RoBERTa and their kin | GPT-2 and its kin; whatever prefix the model class put in front
_TOKEN_NAMES = ("embeddings.word_embeddings.weight", "wte.weight")
_POSITION_NAMES = ("embeddings.position_embeddings.weight", "wpe.weight")


class TextTables(NamedTuple):
    """Token and position table, float32, on the CPU."""

    tokens: Tensor  # (V, W)
    positions: Tensor | None  # (R, W); None: the model has no such table


def load_text_tables(name_or_folder: str | Path, *, local_files_only: bool = False) -> TextTables:
    """Token and position tables of a model like RoBERTa, BERT or GPT-2; GPT-J has no position table.

    Args:
        name_or_folder: a folder that `save_pretrained` wrote, or a Hugging Face name.
        local_files_only: for a name: use what was downloaded before, without the network.

    Raises:
        InputError: not found, no safetensors, no learned position table beside one of BERT's kind.
    """
    index = _find(name_or_folder, _INDEX, local_files_only)
    if index is not None:  # weights in several files
        file_of: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        single = _find(name_or_folder, _WEIGHTS, local_files_only)
        if single is None:
            raise InputError(
                _FIELD,
                name_or_folder,
                f"has no {_WEIGHTS} (or was not found): give a Hugging Face name or a folder with safetensors weights; "
                "pickled weights are not read, convert them with save_pretrained first",
            )
        with safe_open(single, framework="pt") as weights:
            file_of = dict.fromkeys(weights.keys(), _WEIGHTS)
    token_key = _only_key(file_of, _TOKEN_NAMES, name_or_folder)
    keys = [token_key]
    # Of GPT's kind one without a position table is no damaged file: GPT-J's positions are rotary.
    if not token_key.endswith("wte.weight") or _keys_of(file_of, _POSITION_NAMES):
        keys.append(_only_key(file_of, _POSITION_NAMES, name_or_folder))
    tables = []
    for key in keys:
        path = _find(name_or_folder, file_of[key], local_files_only)
        if path is None:
            raise InputError(_FIELD, name_or_folder, f"its index names {file_of[key]}, which is missing")
        with safe_open(path, framework="pt") as weights:
            tables.append(weights.get_tensor(key).float())
    return TextTables(tables[0], tables[1] if len(tables) > 1 else None)


def apply_text_tables(model: KoDalle, tables: TextTables) -> None:
    """Copies the tables into the model, whole, as published: row 0 of the position table is of <bos>.

    Where the language model has no position table, the model's own starts with the deviation of the tokens' vectors: with
    that of its usual start, N(0, 1), positions would drown words.

    Raises:
        InputError: names the config key that does not fit, and the number that does.
    """
    config, embedding = model.config, model.text_embedding
    num_tokens, width = tables.tokens.shape
    if config.text_embedding_dim is None and width != config.dim:
        raise InputError(
            "model.dim",
            config.dim,
            f"the pretrained text tables have {width}: set model.dim to {width}, or model.text_embedding_dim, to project them",
        )
    fits = [
        ("model.text_embedding_dim", config.text_embedding_dim or config.dim, width),
        ("model.text_vocab_size", config.text_vocab_size, num_tokens),
    ]
    if tables.positions is not None:
        fits.append(("model.text_position_rows", config.text_position_rows, len(tables.positions)))
    for field, ours, theirs in fits:
        if ours != theirs:
            raise InputError(field, ours, f"the pretrained text tables have {theirs}: set {field} to {theirs}")
    if embedding.positions is None:
        raise InputError("model.rotary", True, "leaves no table for pretrained positions: leave it out")
    with torch.no_grad():
        embedding.tokens[:num_tokens].copy_(tables.tokens)  # rows of unique padding, behind them, are no words
        if tables.positions is not None:
            embedding.positions.copy_(tables.positions)
        else:
            embedding.positions.normal_(0, float(tables.tokens.std()))


def _find(name_or_folder: str | Path, file: str, local_files_only: bool) -> Path | None:
    """Path of one file of the model, downloaded if necessary; None if there is none."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if folder.is_absolute() or str(name_or_folder).startswith("."):
        return None  # meant as a folder, not as a name on the hub
    from transformers.utils.hub import cached_file  # seconds to import, and folders do not need it

    try:
        found = cached_file(
            str(name_or_folder), file, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:  # no such model, no network, or gated
        raise InputError(_FIELD, name_or_folder, f"cannot be read from the Hugging Face hub: {error}") from error
    return None if found is None else Path(found)


def _only_key(keys: Mapping[str, str], suffixes: tuple[str, ...], name_or_folder: str | Path) -> str:
    matches = _keys_of(keys, suffixes)
    if len(matches) != 1:
        found = ", ".join(matches) or "none"
        raise InputError(
            _FIELD, name_or_folder, f"needs exactly one tensor named …{' or …'.join(suffixes)}; has {found}"
        )
    return matches[0]


def _keys_of(keys: Mapping[str, str], suffixes: tuple[str, ...]) -> list[str]:
    return [key for key in keys if any(key == suffix or key.endswith("." + suffix) for suffix in suffixes)]
