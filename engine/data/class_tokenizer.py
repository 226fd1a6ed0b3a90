"""Tokenizers of models whose images are not described by a text: each class is one token, or any caption is the same one.

A class is named as it stands, white space around it apart; a name that is none is refused by `CaptionTokenizer.encode`.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError

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
        raise InputError("class", "none", "there must be one at least")
    return _tokenizer(models.WordLevel(vocabulary, unk_token=_no_unknown(vocabulary)))


def unconditional_tokenizer() -> CaptionTokenizer:
    """One token, whatever the caption."""
    return _tokenizer(models.WordLevel({_ANY: 0}, unk_token=_ANY))


def _no_unknown(vocabulary: dict[str, int]) -> str:
    """A name that is not in it: what is unknown stays unknown."""
    name = "[UNK]"
    while name in vocabulary:
        name = f"[{name}]"
    return name


def _tokenizer(model: models.WordLevel) -> CaptionTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    return CaptionTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
