"""Words of a prompt that a model knows, those that it does not, and what to write in their place.

A model has learned the tokens of its training captions. A word outside its vocabulary is one unknown token, [UNK]; a word of
letters that it has as entries, but never read in training, is as foreign to it: `레드` to a model that only ever read
`레드이다`. It makes a picture as if such a word were not there, and nothing else tells that picture from a good one. So
answers count such tokens and name their words.

What to write instead is looked up in the model's captions.json (engine/data/caption_guide.py): its values, its synonyms, its values by
their names in any language; the same keys in the other keyboard layout; and then the nearest of all these and of the training
captions' words, by edit distance over Hangul's letters (jamo): 레두 and 레드 differ in one letter of four. A compound is its
parts (engine/data/compound_words.py), each with its own suggestion, and one without for what is no term. Letters are compared by
what they look like (NFKC): ＲＥＤ and ⓡⓔⓓ are red.

No torch, no ray.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from tokenizers import Encoding, Tokenizer, models

from engine.data.caption_guide import CaptionGuide
from engine.data.compound_words import LONGEST_ENDING, Part, Terms, is_ending, is_hangul, known_parts, whole_parts
from engine.data.keyboard_layouts import in_other_layout

_NEAR, _VERY_NEAR = 3, 5  # one letter in so many may differ; in a compound's place, which 티셔쓰 is not
_COMPARED_WORDS = 5_000  # the commonest; a prompt is read while its writer waits
_MOST_NAMED = 8  # in a line of text
_MOST_SUGGESTED = 32  # of one prompt


@dataclass(frozen=True)
class UnknownWord:
    """A word, words that belong together, or a part of a compound, that the model does not know, at prompt[start:end].

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
        self._longest = max(map(len, self._terms), default=0) + LONGEST_ENDING
        self._parts = self._parts_of_compounds()
        self._part_terms = Terms.of(self._parts)
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

    def _parts_of_compounds(self) -> dict[str, str]:
        """Terms, in one word (skyblue), and words of the training captions, to their value (레드이다: 레드) or to themselves."""
        meant = {self._completed[value]: value for value in self._values if value in self._completed}
        words = {_term_form(word): meant.get(word, word) for word in self._words if len(word) > 1}
        return words | {term.replace(" ", ""): known for term, known in self._terms.items()}

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
        read: dict[str, tuple[UnknownWord, ...]] = {}
        after = 0
        for number, (start, end) in enumerate(spans):
            if start < after:
                continue  # part of the term before
            ends = [last for _, last in spans[number : number + self._longest] if last - start <= self._longest]
            found = self._term_at(prompt, start, ends)
            if found is not None:
                after, known, ending = found
                yield self._named(prompt[start:after], start, known, ending)
                continue
            word, after = prompt[start:end], end
            if word not in read:
                is_read = len(read) < _MOST_SUGGESTED
                read[word] = self._in_parts(word) if is_read else (UnknownWord(word, 0, len(word)),)
            for part in read[word]:
                yield replace(part, start=start + part.start, end=start + part.end)

    def _named(self, word: str, start: int, known: str | None, ending: str = "") -> UnknownWord:
        """A word at prompt[start:] that means what the model calls `known`."""
        if known is None:
            return UnknownWord(word, start, start + len(word))
        value = known if known in self._values else None
        return UnknownWord(word, start, start + len(word), self._as_known(known, ending), value)

    def _in_parts(self, word: str) -> tuple[UnknownWord, ...]:
        """A word that is no term: its parts where it is a compound, else itself with what is near; places are its own."""
        form = _term_form(word)
        divisible = form if len(form) == len(word) else ""
        parts = whole_parts(divisible, self._part_terms)
        whole, is_near = (None, False) if parts else self._likely(word)
        if not parts and not is_near:
            parts = known_parts(divisible, self._part_terms)
        if not parts:
            return (replace(whole, word=word, end=len(word)) if whole else UnknownWord(word, 0, len(word)),)
        are_rests_read = sum(not part.term for part in parts) == 1  # more are no misspelling, and each takes its time
        return tuple(self._part(word[one.start : one.end], one, is_read=are_rests_read) for one in parts)

    def _part(self, text: str, part: Part, *, is_read: bool) -> UnknownWord:
        if part.term:
            return self._named(text, part.start, self._parts[part.term], part.ending)
        found = self._likely(text)[0] if is_read and len(text) > 1 else None
        return replace(found or UnknownWord(text, 0, 0), word=text, start=part.start, end=part.end)

    def _term_at(self, prompt: str, start: int, ends: list[int]) -> tuple[int, str, str] | None:
        """The longest term at `start`: where it ends, what the model calls it, and the Korean ending that it has."""
        for end in reversed(ends):
            text = _term_form(prompt[start:end])
            joined = text.replace(" ", "")
            if end != ends[0] and joined in self._terms:  # 스카이 블루
                return end, self._terms[joined], ""
            for length in range(len(text), max(0, len(text) - LONGEST_ENDING - 1), -1):
                term, ending = text[:length], text[length:]
                if term in self._terms and is_ending(term, ending):
                    return end, self._terms[term], ending
        return None

    def _likely(self, word: str) -> tuple[UnknownWord | None, bool]:
        """What is meant by a word whose letters, or those of the same keys in the other layout, are near; and if very near."""
        typed = in_other_layout(word)
        if typed is not None:
            found = self._term_at(typed, 0, [len(typed)])
            if found is not None:
                return self._named(typed, 0, found[1]), True
            if typed in self._words:
                return self._named(typed, 0, typed), True
            parts = whole_parts(typed, self._part_terms)
            if parts:
                texts = (self._as_known(self._parts[part.term], part.ending) for part in parts)
                return UnknownWord(typed, 0, len(typed), " ".join(filter(None, texts))), True
        for text in (word, typed):
            near = None if text is None else self._nearest(text)
            if text is not None and near is not None:
                return self._named(text, 0, near[0]), near[1] <= len(_letters(text)) // _VERY_NEAR
        return None, False

    def _nearest(self, word: str) -> tuple[str, int] | None:
        """The word or value of the model that differs in the fewest letters, the commonest of equals, and in how many."""
        letters = _letters(word)
        cutoff = len(letters) // _NEAR
        if cutoff == 0 or not any(map(str.isalpha, letters)):
            return None
        found = process.extractOne(letters, self._choices, scorer=Levenshtein.distance, score_cutoff=cutoff)
        return None if found is None else (self._terms.get(found[2], found[2]), int(found[1]))


def described(words: Iterable[UnknownWord]) -> str:
    """Unknown words for a line of text, each once: `하늘색 (스카이블루?), 오버핏`."""
    texts = [one.word if one.suggestion is None else f"{one.word} ({one.suggestion}?)" for one in words]
    return ", ".join(dict.fromkeys(texts))


def _completed(words: Iterable[str]) -> dict[str, str]:
    """Words without up to three of their last syllables, to the commonest such word: 스카이블루 to 스카이블루이다."""
    found: dict[str, str] = {}
    for word in words:
        for length in range(len(word) - 1, max(0, len(word) - LONGEST_ENDING - 1), -1):
            if not all(map(is_hangul, word[length - 1 :])):
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
