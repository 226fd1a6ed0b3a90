"""Tokenizers of models whose images are not described by a text: each class is one token, or any caption is the same one.

A class is named as it stands, white space around it apart; a name that is none is refused by `CaptionTokenizer.encode`.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers

from engine.config.run import TextConfig
from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import CaptionTokenizer, load_tokenizer, tokenizer_for
from engine.data.tokenizer_files import SpecialTokens
from engine.errors import InputError
from engine.text import clean_text

_ANY = "image"


def class_tokenizer(names: Iterable[str]) -> CaptionTokenizer:
    """A token a name, numbered in the order of the names.

    Raises:
        InputError: no names, or one twice.
    """
    vocabulary: dict[str, int] = {}
    for name in names:
        if not name.strip() or name.strip() in vocabulary:
            raise InputError("class", name, "is empty or there twice: every class needs a name of its own")
        vocabulary[name.strip()] = len(vocabulary)
    if not vocabulary:
        raise InputError("class", "nothing", "there must be one at least")
    return _tokenizer(models.WordLevel(vocabulary, unk_token=_no_unknown(vocabulary)))


def unconditional_tokenizer() -> CaptionTokenizer:
    """One token, whatever the caption."""
    return _tokenizer(models.WordLevel({_ANY: 0}, unk_token=_ANY))


def conditioned_tokenizer(
    text: TextConfig, model: TransformerConfig, captions: Iterable[str], *, start_from: Path | None
) -> CaptionTokenizer:
    """The tokenizer of a training, whatever its images are made of: see `tokenizer_for`.

    `train` numbers the distinct captions of a model of classes, in their order.

    Raises:
        InputError: as `tokenizer_for`; more classes than the model has rows for.
    """
    if model.condition == "text":
        return tokenizer_for(text, captions, table_rows=model.text_vocab_size, start_from=start_from)
    if model.condition == "nothing":
        return unconditional_tokenizer()
    if text.tokenizer == "train-bpe":
        raise InputError(
            "text.tokenizer", text.tokenizer, "cuts names into pieces, and a class is one token: write `train`"
        )
    if text.tokenizer != "train":
        tokenizer = load_tokenizer(text.tokenizer)
    else:
        tokenizer = class_tokenizer(sorted({clean_text(caption).strip() for caption in captions}))
    if tokenizer.vocab_size > model.text_vocab_size or not tokenizer.names_classes:
        field, value = ("model.text_vocab_size", model.text_vocab_size)
        raise InputError(
            field, value, f"there are {tokenizer.vocab_size} different captions, and each is a class: write that number"
        )
    return tokenizer


def _no_unknown(vocabulary: dict[str, int]) -> str:
    """A name that is not in it: what is unknown stays unknown."""
    name = "[UNK]"
    while name in vocabulary:
        name = f"[{name}]"
    return name


def _tokenizer(model: models.WordLevel) -> CaptionTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    return CaptionTokenizer(tokenizer, SpecialTokens())
