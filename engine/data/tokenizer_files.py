"""Tokenizers as files: of the `tokenizers` library, with what transformers' tokenizer_config.json says of special tokens.

    tokenizer.json           vocabulary and rules
    tokenizer_config.json    which entry begins, ends, pads, …; class `TokenizersBackend`: nothing beside the two files counts

Such folders, which every model of the engine is, are read without transformers, whose import takes as long as torch's. Of any other
folder, and of a hub name, transformers makes a tokenizer, which is written as such a folder.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from engine.data.tokenizer_limits import check_tokenizer_file
from engine.errors import InputError
from engine.files import write_json

_CONFIG = "tokenizer_config.json"
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# Keys of a plain tokenizer that change nothing that is used here; with any other, transformers reads the folder.
_WITHOUT_EFFECT = frozenset(
    [
        "backend",
        "is_local",
        "local_files_only",
        "model_max_length",
        "name_or_path",
        "processor_class",
        "tokenizer_class",
    ]
)
_NO_LENGTH = 1000000000000000019884624838656  # transformers' `model_max_length` of what has none


@dataclass(frozen=True)
class SpecialTokens:
    """Entries that are no part of a text, by transformers' names; None: there is no such entry."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    sep_token: str | None = None
    pad_token: str | None = None
    cls_token: str | None = None
    mask_token: str | None = None
    extra_special_tokens: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, str]:
        """Those that have a role, by its name."""
        values = {name: getattr(self, name) for name in _ROLES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def entries(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.named.values(), *self.extra_special_tokens]))


_ROLES = tuple(field.name for field in fields(SpecialTokens) if field.name.endswith("_token"))


def completed(tokenizer: Tokenizer, special: SpecialTokens) -> Tokenizer:
    """The tokenizer with its special tokens among its entries, without a length of its own; changed in place, as transformers does."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special.entries if token not in known])
    if tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return tokenizer


def read_tokenizer(name_or_folder: str) -> tuple[Tokenizer, SpecialTokens]:
    """A tokenizer by hub name or local folder; never runs code from the folder.

    Raises:
        InputError: it cannot be found or read, or a folder's rules may lengthen a text too much.
    """
    own = Path(name_or_folder) / "tokenizer.json"
    if own.is_file():
        check_tokenizer_file(own)
    try:
        special = _plain(own.parent) if own.is_file() else None
        if special is None:
            return _by_transformers(name_or_folder)
        return Tokenizer.from_buffer(own.read_bytes()), special
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "text.tokenizer",
            name_or_folder,
            f"cannot be loaded ({reason}): give a folder with tokenizer.json, a hub name that is reachable, `train` or `train-bpe`",
        ) from error


def write_tokenizer(folder: Path, tokenizer: Tokenizer, special: SpecialTokens) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"backend": "tokenizers", "model_max_length": _NO_LENGTH, **special.named}
    if special.extra_special_tokens:
        config["extra_special_tokens"] = list(special.extra_special_tokens)
    write_json(folder / _CONFIG, dict(sorted((config | {"tokenizer_class": _PLAIN_CLASSES[0]}).items())))


def _plain(folder: Path) -> SpecialTokens | None:
    """Special tokens of a folder that holds nothing but vocabulary, rules and these; None: transformers has to read it.

    Raises:
        ValueError: its config is no JSON.
    """
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(config, dict) or config.get("tokenizer_class") not in _PLAIN_CLASSES:
        return None
    named = {name: config.pop(name) for name in _ROLES if config.get(name) is not None}
    extra = config.pop("extra_special_tokens", [])
    rest = {name for name, value in config.items() if value not in (None, False)}
    if rest - _WITHOUT_EFFECT or not isinstance(extra, list):
        return None
    if not all(isinstance(token, str) for token in [*named.values(), *extra]):  # tokens with rules of their own
        return None
    return SpecialTokens(**named, extra_special_tokens=tuple(extra))


def _by_transformers(name_or_folder: str) -> tuple[Tokenizer, SpecialTokens]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # half a second, and no model of ours needs them

    tokenizer = AutoTokenizer.from_pretrained(name_or_folder, use_fast=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError("text.tokenizer", name_or_folder, "has no fast version (tokenizer.json): convert it first")
    extra = tuple(str(token) for token in tokenizer.extra_special_tokens)
    return tokenizer.backend_tokenizer, SpecialTokens(**tokenizer.special_tokens_map, extra_special_tokens=extra)
