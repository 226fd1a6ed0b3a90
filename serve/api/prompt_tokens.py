"""Tokens of a prompt, and the words of it that the served model does not know.

A word outside the vocabulary is one unknown token, [UNK], whatever it says: the model makes a picture as if the word were not
there. Answers count such tokens and name their words, because nothing else tells a picture of half a caption from a good one.

No torch, no ray.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Encoding, Tokenizer, models


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model's tokenizer reads it, before anything is cut.

    count: tokens, [CLS] and [SEP] included.
    unknown: those outside the vocabulary.
    unknown_words: their words as written in the prompt, in its order, each once.
    """

    count: int
    unknown: int
    unknown_words: tuple[str, ...]


def prompt_tokens(tokenizer_json: str, prompt: str) -> PromptTokens:
    """Tokens of a prompt in its normal form; a class name is one token, whether the model has it or not."""
    tokenizer, unknown_id = _tokenizer(tokenizer_json)
    if isinstance(tokenizer.model, models.WordLevel) and tokenizer.pre_tokenizer is None:
        name = prompt if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(prompt)
        is_known = tokenizer.token_to_id(name) is not None
        return PromptTokens(1, 0, ()) if is_known else PromptTokens(1, 1, (prompt,))
    encoding = tokenizer.encode(prompt)
    places = [number for number, token in enumerate(encoding.ids) if token == unknown_id]
    spans = _word_spans(encoding)
    words = dict.fromkeys(prompt[slice(*spans[place])].strip() for place in places)
    return PromptTokens(len(encoding.ids), len(places), tuple(word for word in words if word))


def _word_spans(encoding: Encoding) -> list[tuple[int, int]]:
    """Where each token's word is in the prompt, as the tokenizer divides it: at white space, punctuation for itself."""
    offsets, word_ids = encoding.offsets, encoding.word_ids  # lists made anew at each access
    spans: dict[int, tuple[int, int]] = {}
    for (start, end), word in zip(offsets, word_ids, strict=True):
        if word is not None:
            first, last = spans.get(word, (start, end))
            spans[word] = min(first, start), max(last, end)
    return [span if word is None else spans[word] for span, word in zip(offsets, word_ids, strict=True)]


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the id of its unknown token; None: it has none, as one of bytes."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = json.loads(tokenizer_json)["model"]
    unknown = model.get("unk_token")
    return tokenizer, model.get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
