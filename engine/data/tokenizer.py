"""Captions to text tokens.

A tokenizer is a Hugging Face one, by name or folder (klue/roberta-large: WordPiece, 32,000 entries), or is trained on
the training captions, as WordPiece or as byte-pair encoding (engine/data/bpe.py). A trained one has klue/roberta's special
ids, so that all are used alike: [CLS] 0, [PAD] 1, [SEP] 2, [UNK] 3, [MASK] 4.

B captions, T text positions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from engine.data.bpe import BpeDropout, is_byte, least_vocab_size, train_bpe
from engine.data.tokenizer_files import SpecialTokens, completed, read_tokenizer, write_tokenizer
from engine.errors import InputError
from engine.text import clean_text, shown

if TYPE_CHECKING:
    from engine.config.run import TextConfig
    from engine.config.transformer import TransformerConfig

SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")


@dataclass(frozen=True)
class EncodedCaptions:
    """Text tokens of a batch of captions.

    tokens: (B, T) int64, [CLS] … [SEP] [PAD] ….
    cut: per caption, how many tokens did not fit.
    """

    tokens: Tensor
    cut: list[int]


class CaptionTokenizer:
    """Captions to fixed-length text tokens, with the number of tokens cut.

    Args:
        tokenizer: is changed in place, see `completed`.
        name: where it comes from, for messages.

    Raises:
        InputError: no special token that could stand for padding.
    """

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens, *, name: str = "") -> None:
        self._tokenizer, self._special = completed(tokenizer, special), special
        # A caption is one token: engine/data/class_tokenizer.py.
        self.names_classes = isinstance(tokenizer.model, models.WordLevel) and tokenizer.pre_tokenizer is None
        self.pad_id = -1 if self.names_classes else self._padding(name)

    @property
    def vocab_size(self) -> int:
        """Entries, including added ones: the least size of an embedding table."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def num_rows(self) -> int:
        """Rows of an embedding table that has one for each entry: the greatest number and one."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give equal tokens: 16 hex digits over vocabulary, rules and special tokens."""
        rules = json.loads(self.to_json())
        rules.pop("truncation", None)  # how texts are cut and padded is the caller's
        rules.pop("padding", None)
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, captions: Sequence[str], text_seq_len: int, *, strict: bool = False) -> EncodedCaptions:
        """Tokenises captions in their normal form (engine/text.py), adds [CLS] and [SEP], cuts or pads to `text_seq_len`.

        Raises:
            InputError: characters that no text has; with `strict`, a caption that does not fit, with the number of tokens that
                would be cut.
        """
        if not captions:
            return EncodedCaptions(torch.empty(0, text_seq_len, dtype=torch.int64, device="cpu"), [])
        texts = [clean_text(caption) for caption in captions]
        if self.names_classes:
            tokens = torch.tensor([[self._class(name)] for name in texts], dtype=torch.int64, device="cpu")
            return EncodedCaptions(tokens, [0] * len(captions))
        lists = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        rows, cut = [], []
        for caption, ids in zip(captions, lists, strict=True):
            excess = max(0, len(ids) - text_seq_len)
            if excess and strict:
                raise InputError(
                    "caption",
                    shown(caption),
                    f"is {len(ids)} tokens, {excess} more than the model's {text_seq_len}: shorten it, "
                    "or leave out --strict to have its end cut",
                )
            # A last [SEP] stays, the caption's end goes (what Hugging Face truncation does).
            kept = ids[:text_seq_len]
            if excess and ids[-1] in self.end_ids:
                kept = ids[: text_seq_len - 1] + ids[-1:]
            rows.append(kept + [self.pad_id] * (text_seq_len - len(kept)))
            cut.append(excess)
        return EncodedCaptions(torch.tensor(rows, dtype=torch.int64, device="cpu"), cut)

    def empty(self, text_seq_len: int) -> Tensor:
        """Tokens of the empty caption, (1, T): the unconditional side of guidance; there is none among classes."""
        assert not self.names_classes
        return self.encode([""], text_seq_len).tokens

    def _class(self, name: str) -> int:
        """Raises InputError: a name that is no class."""
        backend = self._tokenizer
        normalised = name if backend.normalizer is None else backend.normalizer.normalize_str(name)
        found = backend.token_to_id(normalised)
        if found is None:
            found = backend.token_to_id(backend.model.unk_token or "")
        if found is None:
            names = sorted(backend.get_vocab().items(), key=lambda item: item[1])
            listed = ", ".join(entry for entry, _ in names[:6]) + (f", … {names[-1][0]}" if len(names) > 6 else "")
            raise InputError("caption", shown(name), f"is none of the model's {len(names)} classes: {listed}")
        return int(found)

    def encode_beginning(self, beginning: str) -> list[int]:
        """Tokens of a caption that is to be continued: [CLS] and its words, without the [SEP] that would end it."""
        ids = self._tokenizer.encode(clean_text(beginning)).ids
        while ids and ids[-1] in self.end_ids:
            ids = ids[:-1]
        return list(ids)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a caption: [SEP] and [PAD] (the end token where there is no [SEP])."""
        found = (self._id(self._special.sep_token), self._id(self._special.eos_token), self.pad_id)
        return frozenset(token for token in found if token is not None)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not part of a word: [CLS], [PAD], [SEP], [UNK], [MASK]."""
        return frozenset(found for entry in self._special.entries if (found := self._id(entry)) is not None)

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a masked one, [MASK]; None if there is none."""
        return self._id(self._special.mask_token)

    @property
    def byte_ids(self) -> frozenset[int]:
        """Tokens that are one byte of a letter, and no text by themselves."""
        return frozenset(number for entry, number in self._tokenizer.get_vocab().items() if is_byte(entry))

    @property
    def lowercases(self) -> bool:
        """Whether captions that differ in upper and lower case alone have the same tokens."""
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and normalizer.normalize_str("A") == normalizer.normalize_str("a")

    def dropout(self, rate: float) -> BpeDropout | None:
        """What leaves merges out at random in training; None at rate 0.

        Raises:
            InputError: no tokenizer of `train_bpe_tokenizer`.
        """
        if rate == 0:
            return None
        return BpeDropout(self.to_json(), special_ids=self.special_ids, pad_id=self.pad_id, rate=rate)

    def decode(self, tokens: Sequence[int]) -> str:
        """A caption of its tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def to_json(self) -> str:
        """The tokenizer for `tokenizers.Tokenizer.from_str`, which needs no torch."""
        return str(self._tokenizer.to_str())

    def extends(self, other: "CaptionTokenizer") -> bool:
        """Whether every entry of `other` has the same number here."""
        own = self._tokenizer.get_vocab()
        return all(own.get(entry) == number for entry, number in other._tokenizer.get_vocab().items())

    def with_backend(self, backend: Tokenizer) -> "CaptionTokenizer":
        """Another vocabulary under the same special tokens."""
        return CaptionTokenizer(backend, self._special)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into `folder`."""
        write_tokenizer(folder, self._tokenizer, self._special)

    def _padding(self, name: str) -> int:
        found = self._id(self._special.pad_token)
        found = self._id(self._special.eos_token) if found is None else found
        if found is None:
            raise InputError("text.tokenizer", name, "has neither a padding nor an end token: add pad_token")
        return found

    def _id(self, entry: str | None) -> int | None:
        found: int | None = None if entry is None else self._tokenizer.token_to_id(entry)
        return found


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, lowercase: bool = False) -> CaptionTokenizer:
    """WordPiece on `captions`: whole words while they last, so that small vocabularies give short captions.

    Deterministic: equal captions in any order give equal tokens, in this process or another. The trainer alone is not:
    it numbers word-inner letters (`##a`) in the order of a hash table, and breaks ties by number. Passed to it as
    special tokens they have their numbers before; the vocabulary is then put into a tokenizer where they are plain.
    """
    normalizer, splitter = _normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    captions = sorted(normalizer.normalize_str(caption) for caption in captions)
    words = {word for caption in set(captions) for word, _ in splitter.pre_tokenize_str(caption)}
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False, min_frequency=1
    )
    trained.train_from_iterator(captions, trainer)
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    return _with_special_tokens(tokenizer)


def train_bpe_tokenizer(captions: Iterable[str], *, vocab_size: int, lowercase: bool = False) -> CaptionTokenizer:
    """Byte-pair encoding on `captions`, without an unknown token; deterministic as `train_tokenizer`.

    Raises:
        InputError: a vocabulary without room for the bytes.
    """
    least = least_vocab_size(SPECIAL_TOKENS)
    if vocab_size < least:
        raise InputError(
            "text.vocab_size",
            vocab_size,
            f"train-bpe needs {least} at least, 256 of them for bytes: raise it, or `train`",
        )
    return _with_special_tokens(
        train_bpe(captions, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, normalizer=_normalizer(lowercase))
    )


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]) if lowercase else normalizers.NFC()


def _with_special_tokens(tokenizer: Tokenizer) -> CaptionTokenizer:
    """A trained tokenizer whose first entries are `SPECIAL_TOKENS`, and which writes [CLS] … [SEP]."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return CaptionTokenizer(
        tokenizer,
        SpecialTokens(cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]"),
    )


def extend_tokenizer(base: CaptionTokenizer, captions: Iterable[str], *, vocab_size: int) -> CaptionTokenizer:
    """A WordPiece tokenizer with the words that it splits or does not know as entries, the commonest first.

    Old entries keep their numbers. A tokenizer of another kind is returned as it is: it has pieces for everything.

    Args:
        vocab_size: entries that there may be at most.
    """
    tree = json.loads(base.to_json())
    if tree["model"]["type"] != "WordPiece":
        return base
    backend = Tokenizer.from_str(base.to_json())
    counts: Counter[str] = Counter()
    for caption in captions:
        text = backend.normalizer.normalize_str(caption) if backend.normalizer is not None else caption
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    vocabulary = tree["model"]["vocab"]
    new = sorted((word for word in counts if word not in vocabulary), key=lambda word: (-counts[word], word))
    for number, word in enumerate(new[: max(0, vocab_size - base.vocab_size)]):
        vocabulary[word] = base.vocab_size + number
    return base.with_backend(Tokenizer.from_str(json.dumps(tree)))


def tokenizer_for(
    text: "TextConfig", captions: Iterable[str], *, table_rows: int, start_from: Path | None = None
) -> CaptionTokenizer:
    """The tokenizer of a run's `text` section.

    Args:
        captions: of the training split; a `train` or `train-bpe` tokenizer is made from them.
        table_rows: rows of the model's token table (`model.text_vocab_size`).
        start_from: model folder that the run starts from: a `train` tokenizer is its own with the captions' new words, a
            `train-bpe` one its own as it is.

    Raises:
        InputError: it cannot be loaded, has more entries than the table has rows, or other numbers for the entries of
            the model that the run starts from.
    """
    before = None if start_from is None else load_tokenizer(str(start_from))
    if text.is_trained and before is not None:
        if text.lowercase and not before.lowercases:
            raise InputError("text.lowercase", True, f"the tokenizer of {start_from} keeps upper case: leave it out")
        tokenizer = extend_tokenizer(
            before, captions, vocab_size=min(table_rows, max(text.vocab_size, before.vocab_size))
        )
    elif text.tokenizer == "train":
        tokenizer = train_tokenizer(captions, vocab_size=text.vocab_size, lowercase=text.lowercase)
    elif text.tokenizer == "train-bpe":
        tokenizer = train_bpe_tokenizer(captions, vocab_size=text.vocab_size, lowercase=text.lowercase)
    else:
        tokenizer = load_tokenizer(text.tokenizer)
    if tokenizer.vocab_size > table_rows:
        raise InputError(
            "model.text_vocab_size", table_rows, f"the tokenizer has {tokenizer.vocab_size} entries: raise it"
        )
    if before is not None and not tokenizer.extends(before):
        raise InputError(
            "text.tokenizer",
            text.tokenizer,
            f"numbers the entries of {start_from} otherwise: write `train`, or that folder",
        )
    return tokenizer


def check_padding(tokenizer: CaptionTokenizer, config: "TransformerConfig", *, field: str, value: object) -> None:
    """Raises InputError: a model whose config says what padding is, with a tokenizer that pads with another id."""
    is_stated = config.unique_padding or config.padding_token is not None
    if is_stated and tokenizer.pad_id != config.padding_id:
        what = "with unique_padding " if config.unique_padding else "of this config "
        raise InputError(
            field,
            value,
            f"pads with {tokenizer.pad_id}, and a model {what}reads {config.padding_id} as padding: "
            f"train it with model.padding_token: {tokenizer.pad_id}",
        )


def load_tokenizer(name_or_folder: str) -> CaptionTokenizer:
    """A Hugging Face tokenizer by hub name or local folder; never runs code from the folder.

    Raises:
        InputError: it cannot be found or read, or a folder's rules may lengthen a text too much.
    """
    return CaptionTokenizer(*read_tokenizer(name_or_folder), name=name_or_folder)
