"""Words of a prompt that a model knows, those that it does not, and what to write in their place.

A model has learned the tokens of its training captions. A word outside its vocabulary is one unknown token, [UNK]; a word of
letters that it has as entries, but never read in training, is as foreign to it: `레드` to a model that only ever read
`레드이다`. It makes a picture as if such a word were not there, and nothing else tells that picture from a good one. So
answers count such tokens and name their words.

What to write instead is looked up in the model's captions.json (engine/data/caption_guide.py): its values, its synonyms, its values by
their names in any language; the same keys in the other keyboard layout; and then the nearest of all these and of the training
captions' words, by edit distance over Hangul's letters (jamo): 레두 and 레드 differ in one letter of four. Letters are compared
by what they look like (NFKC): ＲＥＤ and ⓡⓔⓓ are red.

No torch, no ray.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from tokenizers import Encoding, Tokenizer, models

from engine.data.caption_guide import CaptionGuide
from engine.data.keyboard_layouts import in_other_layout

_LONGEST_ENDING = 3  # syllables that Korean grammar hangs onto a word: 이다, 에서, 으로
_NEAR = 3  # one letter in so many may differ
_COMPARED_WORDS = 5_000  # the commonest; a prompt is read while its writer waits
_MOST_NAMED = 8  # in a line of text
_MOST_SUGGESTED = 32  # of one prompt


@dataclass(frozen=True)
class UnknownWord:
    """A word, or words that belong together, that the model does not know, at prompt[start:end].

    suggestion: a word of the training captions to write instead; None where none is near.
    value: what the model's attributes call it, if it is one of their values.
    """

    word: str
    start: int
    end: int
    suggestion: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class PromptWords:
    """A prompt as the model's tokenizer reads it, before anything is cut.

    count: tokens, [CLS] and [SEP] included.
    tokens_unknown: those outside the vocabulary, and those that no training caption had.
    num_words, num_known: words, and those of them that the model knows; punctuation is none.
    unknown: in the prompt's order.
    """

    count: int
    tokens_unknown: int
    num_words: int
    num_known: int
    unknown: tuple[UnknownWord, ...] = ()

    @property
    def words_unknown(self) -> tuple[str, ...]:
        """The unknown words, each once."""
        return tuple(dict.fromkeys(one.word for one in self.unknown))

    @property
    def all_known(self) -> bool:
        """Whether the model knows every word, and there is one."""
        return 0 < self.num_words == self.num_known

    @property
    def fault(self) -> str:
        """Why a strict reader refuses the prompt, with a remedy, for a line of text."""
        if not self.num_words:
            return "has no word: write one"
        few = described(self.unknown[:_MOST_NAMED]) + (", …" if len(self.unknown) > _MOST_NAMED else "")
        return f"has words that the model does not know ({few}): write others"


class PromptReader:
    """What a model knows of prompts: its tokenizer, the tokens that it has learned, and its words."""

    def __init__(self, tokenizer_json: str, guide: CaptionGuide) -> None:
        self._tokenizer, self._unknown_id = _tokenizer(tokenizer_json)
        model, splitter = self._tokenizer.model, self._tokenizer.pre_tokenizer
        self._names_classes = isinstance(model, models.WordLevel) and splitter is None
        self._learned = None if self._names_classes else _learned(self._tokenizer, guide)
        self._words = dict.fromkeys(guide.words)
        self._completed = _completed(guide.words)
        self._values = {value for own in guide.attributes.values() for found in own.values() for value in found}
        self._terms = self._known_terms(guide)
        self._longest = max(map(len, self._terms), default=0) + _LONGEST_ENDING
        choices = [*self._terms, *guide.words[:_COMPARED_WORDS]]
        self._choices = {word: _letters(word) for word in choices if any(map(str.isalpha, word))}

    def read(self, prompt: str) -> PromptWords:
        """Tokens of a prompt in its normal form; a class name is one token, whether the model has it or not."""
        if self._names_classes:
            normalizer = self._tokenizer.normalizer
            name = prompt if normalizer is None else normalizer.normalize_str(prompt)
            if self._tokenizer.token_to_id(name) is not None:
                return PromptWords(1, 0, 1, 1)
            return PromptWords(1, 1, 1, 0, (UnknownWord(prompt, 0, len(prompt)),))
        encoding = self._tokenizer.encode(prompt)
        ids, special = encoding.ids, encoding.special_tokens_mask  # lists made anew at each access
        spans = _word_spans(encoding, prompt)
        says = {span: _says_something(prompt[slice(*span)]) for span in set(spans)}
        unknown = [
            token == self._unknown_id
            or not (is_special or self._learned is None or token in self._learned or not says[span])
            for token, is_special, span in zip(ids, special, spans, strict=True)
        ]
        words = sorted({span for span, is_special in zip(spans, special, strict=True) if says[span] and not is_special})
        foreign = {span for span, is_unknown in zip(spans, unknown, strict=True) if is_unknown}
        unknown_words = [span for span in words if span in foreign]
        return PromptWords(
            count=len(ids),
            tokens_unknown=sum(unknown),
            num_words=len(words),
            num_known=len(words) - len(unknown_words),
            unknown=tuple(self._with_suggestions(prompt, unknown_words)),
        )

    def _known_terms(self, guide: CaptionGuide) -> dict[str, str]:
        """What people may write, case-folded, to what the model knows: synonyms, its values, their names by language."""
        every = [*((value, value) for value in sorted(self._values)), *guide.synonyms.items()]
        for names in {} if guide.form is None else guide.form.words.values():
            every += [(shown, value) for value, shown in names.items()]
        found: dict[str, str] = {}
        for term, meant in every:
            # A synonym of a value that this model lacks may have a broader one: jeans, 청바지, 팬츠.
            for known in (meant, guide.synonyms.get(meant)):
                if known is not None and self._is_known(known):
                    found.setdefault(_term_form(term), known)
                    break
        return found

    def _is_known(self, term: str) -> bool:
        """Not by the beginning of a longer value alone: 퍼 (fur) is not 퍼플이다."""
        return term in self._values or term in self._words or (not self._values and term in self._completed)

    def _as_known(self, term: str, ending: str = "") -> str | None:
        """A term as the training captions have it: with that ending, without one, or with the commonest."""
        for word in (term + ending, term):
            if word in self._words:
                return word
        return self._completed.get(term, term if term in self._values else None)

    def _with_suggestions(self, prompt: str, spans: list[tuple[int, int]]) -> Iterator[UnknownWord]:
        """The words of these spans; several in a row that are one term of the model (`sky blue`) are one."""
        nearest: dict[str, str | None] = {}
        after = 0
        for number, (start, end) in enumerate(spans):
            if start < after:
                continue  # part of the term before
            ends = [last for _, last in spans[number : number + self._longest] if last - start <= self._longest]
            after, known, ending = self._term_at(prompt, start, ends) or (end, None, "")
            word = prompt[start:after]
            if known is None:
                if word not in nearest:
                    is_looked_up = len(nearest) < _MOST_SUGGESTED
                    nearest[word] = self._likely(word) if is_looked_up else None
                known = nearest[word]
            suggestion = None if known is None else self._as_known(known, ending)
            yield UnknownWord(word, start, after, suggestion, known if known in self._values else None)

    def _term_at(self, prompt: str, start: int, ends: list[int]) -> tuple[int, str, str] | None:
        """The longest term at `start`: where it ends, what the model calls it, and the Korean ending that it has."""
        for end in reversed(ends):
            text = _term_form(prompt[start:end])
            joined = text.replace(" ", "")
            if end != ends[0] and joined in self._terms:  # 스카이 블루
                return end, self._terms[joined], ""
            for length in range(len(text), max(0, len(text) - _LONGEST_ENDING - 1), -1):
                term, ending = text[:length], text[length:]
                if term in self._terms and (not ending or all(map(_is_hangul, term[-1] + ending))):
                    return end, self._terms[term], ending
        return None

    def _likely(self, word: str) -> str | None:
        """The term, or the word, that the same keys write in the other layout; or the nearest to either."""
        typed = in_other_layout(word)
        found = None if typed is None else self._term_at(typed, 0, [len(typed)])
        if found is not None:
            return found[1]
        if typed in self._words:
            return typed
        return self._nearest(word) or (None if typed is None else self._nearest(typed))

    def _nearest(self, word: str) -> str | None:
        """The word or value of the model that differs in the fewest letters, the commonest of equals."""
        letters = _letters(word)
        cutoff = len(letters) // _NEAR
        if cutoff == 0 or not any(map(str.isalpha, letters)):
            return None
        found = process.extractOne(letters, self._choices, scorer=Levenshtein.distance, score_cutoff=cutoff)
        return None if found is None else self._terms.get(found[2], found[2])


def described(words: Iterable[UnknownWord]) -> str:
    """Unknown words for a line of text, each once: `하늘색 (스카이블루?), 오버핏`."""
    texts = [one.word if one.suggestion is None else f"{one.word} ({one.suggestion}?)" for one in words]
    return ", ".join(dict.fromkeys(texts))


def _completed(words: Iterable[str]) -> dict[str, str]:
    """Words without up to three of their last syllables, to the commonest such word: 스카이블루 to 스카이블루이다."""
    found: dict[str, str] = {}
    for word in words:
        for length in range(len(word) - 1, max(0, len(word) - _LONGEST_ENDING - 1), -1):
            if not all(map(_is_hangul, word[length - 1 :])):
                break
            found.setdefault(word[:length], word)
    return found


def _learned(tokenizer: Tokenizer, guide: CaptionGuide) -> frozenset[int] | None:
    """Tokens of the training captions' words, within a text and at its beginning; None where the words are not known."""
    if not guide.words:
        return None
    texts = [*guide.words, *(f" {word}" for word in guide.words)]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return frozenset(token for encoding in encodings for token in encoding.ids)


def _term_form(text: str) -> str:
    """A term as it is looked up: `T-Shirt` is `t shirt`."""
    return unicodedata.normalize("NFKC", text).casefold().replace("-", " ")


def _letters(word: str) -> str:
    """A word's letters without case, a syllable of Hangul as its two or three."""
    return unicodedata.normalize("NFKD", word).casefold()


def _is_hangul(letter: str) -> bool:
    return "가" <= letter <= "힣"


def _says_something(text: str) -> bool:
    """Whether a text is more than punctuation and white space."""
    return any(not letter.isspace() and not unicodedata.category(letter).startswith("P") for letter in text)


def _word_spans(encoding: Encoding, prompt: str) -> list[tuple[int, int]]:
    """Where each token's word is in the prompt, as the tokenizer divides it: at white space, punctuation for itself."""
    offsets, word_ids = encoding.offsets, encoding.word_ids  # lists made anew at each access
    spans: dict[int, tuple[int, int]] = {}
    for (start, end), word in zip(offsets, word_ids, strict=True):
        if word is not None:
            first, last = spans.get(word, (start, end))
            spans[word] = min(first, start), max(last, end)
    for word, (start, end) in spans.items():  # tokenizers of bytes count the space before a word to it
        text = prompt[start:end]
        spans[word] = end - len(text.lstrip()), start + len(text.rstrip())
    return [span if word is None else spans[word] for span, word in zip(offsets, word_ids, strict=True)]


def _tokenizer(tokenizer_json: str) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the id of its unknown token; None: it has none, as one of bytes."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = json.loads(tokenizer_json)["model"]
    unknown = model.get("unk_token")
    return tokenizer, model.get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
