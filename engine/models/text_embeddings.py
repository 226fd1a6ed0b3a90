"""Token and position tables of a published language model, as the initial text embeddings of KoDALLE.

KoDALLE uses nothing else of klue/roberta-large: no layers, no LayerNorm, no token types. So only the two tables
are read, directly from the safetensors file (134 MB of the 1.3 GB; never a pickle, never code from the hub).

V text vocabulary, C model dim, R position rows.
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

    tokens: Tensor  # (V, C)
    positions: Tensor  # (R, C)


def load_text_tables(name_or_folder: str | Path, *, local_files_only: bool = False) -> TextTables:
    """Token and position tables of a model like RoBERTa, BERT or GPT-2.

    Args:
        name_or_folder: a folder that `save_pretrained` wrote, or a Hugging Face name.
        local_files_only: for a name: use what was downloaded before, without the network.

    Raises:
        InputError: not found, no safetensors, no learned position table.
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
    tables = []
    for suffixes in (_TOKEN_NAMES, _POSITION_NAMES):
        key = _only_key(file_of, suffixes, name_or_folder)
        path = _find(name_or_folder, file_of[key], local_files_only)
        if path is None:
            raise InputError(_FIELD, name_or_folder, f"its index names {file_of[key]}, which is missing")
        with safe_open(path, framework="pt") as weights:
            tables.append(weights.get_tensor(key).float())
    return TextTables(*tables)


def apply_text_tables(model: KoDalle, tables: TextTables) -> None:
    """Copies both tables into the model, whole, as published: row 0 of the position table is of <bos>.

    Raises:
        InputError: names the config key that does not fit, and the number that does.
    """
    config = model.config
    (num_tokens, width), (num_positions, position_width) = tables.tokens.shape, tables.positions.shape
    for field, ours, theirs in (
        ("model.dim", config.dim, width),
        ("model.dim", config.dim, position_width),
        ("model.text_vocab_size", config.text_vocab_size, num_tokens),
        ("model.text_position_rows", config.text_position_rows, num_positions),
    ):
        if ours != theirs:
            raise InputError(field, ours, f"the pretrained text tables have {theirs}: set {field} to {theirs}")
    if model.text_embedding.positions is None:
        raise InputError("model.rotary", True, "leaves no table for pretrained positions: leave it out")
    if config.unique_padding:
        raise InputError("model.unique_padding", True, "pretrained text tables have no rows of padding: leave it out")
    with torch.no_grad():
        model.text_embedding.tokens.copy_(tables.tokens)
        model.text_embedding.positions.copy_(tables.positions)


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
    matches = [key for key in keys if any(key == suffix or key.endswith("." + suffix) for suffix in suffixes)]
    if len(matches) != 1:
        found = ", ".join(matches) or "none"
        raise InputError(
            _FIELD, name_or_folder, f"needs exactly one tensor named …{' or …'.join(suffixes)}; has {found}"
        )
    return matches[0]
