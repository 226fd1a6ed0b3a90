"""Byte-pair encoding of captions (BPE): trained on them, and with merges left out at random while a model trains.

A trained vocabulary has, in this order, the special tokens, a token for each byte, the letters of the captions and what merging
made of them. Letters are the smallest pieces, not bytes: a Hangul syllable is three bytes, and dropout would tear it into parts
that mean nothing. What no caption has, in whatever script, falls back to its bytes, so that there is no unknown token and two
words never seen are two different inputs.

The `tokenizers` library has BPE dropout too, but draws from the thread's own generator: a resumed run would see other tokens. Here
the dropped merges are a function of the generator that is handed in, and 0 dropout gives the library's tokens.

T text positions.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine.errors import InputError

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # the names that `byte_fallback` looks for
_SPACE = "▁"  # stands for the space before a word
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def train_bpe(
    captions: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str],
    normalizer: normalizers.Normalizer,
) -> Tokenizer:
    """A BPE tokenizer; equal captions in any order give equal tokens, in this process or another.

    Letters take at most half of the room beside special tokens and bytes, the commonest first; others are left to the bytes.

    Args:
        vocab_size: entries at most; `least_vocab_size` at least.
    """
    space = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    # Punctuation for itself: a word has the same pieces within a sentence and at its end.
    words = pre_tokenizers.Sequence([space, pre_tokenizers.Punctuation("isolated")])
    captions = sorted(normalizer.normalize_str(caption) for caption in captions)
    letters = Counter(_SPACE)
    for caption in captions:
        letters.update(letter for word, _ in words.pre_tokenize_str(caption) for letter in word)
    room = vocab_size - len(special_tokens) - len(_BYTES)
    assert room > 0, (vocab_size, len(special_tokens))
    # Chosen here: the library breaks ties of its own limit in the order of a hash table.
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))[: max(1, room // 2)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[*special_tokens, *_BYTES],
        initial_alphabet=alphabet, limit_alphabet=len(alphabet),
    )  # fmt: skip
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    # Anew, since the trainer's special tokens, bytes among them, are taken out of texts that spell them.
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    return tokenizer


def least_vocab_size(special_tokens: Sequence[str]) -> int:
    """Entries that `train_bpe` needs: special tokens, bytes and one letter."""
    return len(special_tokens) + len(_BYTES) + 1


def is_byte(entry: str) -> bool:
    """Whether an entry of a vocabulary is one byte of a letter, which alone is no text."""
    return _BYTE.fullmatch(entry) is not None


class BpeDropout:
    """Tokens of a caption as BPE gives them with merges left out at random (Provilkov et al., arXiv 1910.13267).

    At each step of the merging of a word every possible merge is left out with probability `rate`; of the others the first one
    that was learned is done, and where none is left the word is finished. Drops are drawn anew at every visit of a caption.

    Args:
        tokenizer_json: of a tokenizer of `train_bpe`.
        special_ids, pad_id: of the same.
        rate: share of merges left out, in [0, 1).

    Raises:
        InputError: a tokenizer of another kind.
    """

    def __init__(self, tokenizer_json: str, *, special_ids: frozenset[int], pad_id: int, rate: float) -> None:
        tree = json.loads(tokenizer_json)
        model, splitter = tree["model"], tree.get("pre_tokenizer") or {}
        splits = [one["type"] for one in splitter.get("pretokenizers", [])]
        if model["type"] != "BPE" or not model.get("byte_fallback") or splits != ["Metaspace", "Punctuation"]:
            raise InputError(
                "text.bpe_dropout",
                rate,
                "leaves out merges of a tokenizer of `train-bpe`, and this one is another: write 0",
            )
        self.rate = rate
        self._special_ids, self._pad_id = special_ids, pad_id
        self._number: dict[str, int] = model["vocab"]
        self._entry = {number: entry for entry, number in self._number.items()}
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}  # of two tokens: when it was learned, what it makes
        for rank, (left, right) in enumerate(model["merges"]):
            self._merges[self._number[left], self._number[right]] = rank, self._number[left + right]

    def __call__(self, tokens: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Plain tokens (T,) of a caption, [CLS] … [SEP] [PAD] …, to others of the same text, cut or padded to T again."""
        length = len(tokens)
        plain = tokens[tokens != self._pad_id].tolist()
        found = [token for word in self._words(plain) for token in self._merged(word, generator)]
        if len(found) > length:  # the caption's end goes, [SEP] stays: as in `CaptionTokenizer.encode`
            found = [*found[: length - 1], plain[-1]]
        return np.array(found + [self._pad_id] * (length - len(found)), dtype=tokens.dtype)

    def _words(self, tokens: list[int]) -> Iterator[list[int]]:
        """Words as lists of letters; a special token is a word. Punctuation stays with its word: no merge has any of it."""
        word: list[int] = []
        for token in tokens:
            if word and (token in self._special_ids or self._entry[token].startswith(_SPACE)):
                yield word
                word = []
            if token in self._special_ids:
                yield [token]
            else:
                word += self._letters(token)
        if word:
            yield word

    def _letters(self, token: int) -> list[int]:
        entry = self._entry[token]
        return [token] if is_byte(entry) else [self._number[letter] for letter in entry]

    def _merged(self, pieces: list[int], generator: np.random.Generator) -> list[int]:
        while len(pieces) > 1:
            pairs = enumerate(itertools.pairwise(pieces))
            possible = [(self._merges[pair], at) for at, pair in pairs if pair in self._merges]
            kept = [
                merge
                for merge, draw in zip(possible, generator.random(len(possible)), strict=True)
                if draw >= self.rate
            ]
            if not kept:
                break
            (_, made), at = min(kept)
            pieces = [*pieces[:at], made, *pieces[at + 2 :]]
        return pieces
