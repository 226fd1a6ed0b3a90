"""Compound words, divided into the terms that they are made of: 레드셔츠 into 레드 and 셔츠, redshirt into red and shirt.

Korean writes nouns together, and people in a hurry do so in any language. Short terms are found in almost every word (top in
stop, 티 in 커뮤니티), so how long one must be depends on what is left over:

    nothing    the whole word is terms: each counts from one syllable of Hangul, or three other letters
    a rest     between or beside terms, as 린넨 in 린넨셔츠: they count from two syllables, or four letters, and a rest without
               Hangul has three letters at least

The last term may have an ending of its language, which belongs to it: 를, s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

LONGEST_ENDING = 3  # syllables that Korean grammar hangs onto a word: 이다, 에서, 으로

_PARTICLES = """은 는 이 가 을 를 의 에 에서 에게 에는 로 으로 와 과 도 만 랑 이랑 나 이나 하고 처럼 같은 보다 부터 까지 마다
    이다 다 이고 고 이며 며 인 이면 입니다 이에요 예요 이야 야 이네 네 이라 라 이라고 라고 이요 요 용 들 들은 들이 들을 들의
    색 색의 색은 색이 색을 색인 색에 색과 색으로 색이다"""  # 색: colour, behind the name of one
_ENDINGS = frozenset(_PARTICLES.split())
_PLURALS = frozenset(("s", "es"))
_FEWEST_LETTERS_OF_A_REST = 3
_LONGEST_WITH_RESTS = 40  # letters: the time is their square


@dataclass(frozen=True)
class Part:
    """word[start:end]: a term and its ending, or a rest, of which `term` is empty."""

    start: int
    end: int
    term: str = ""
    ending: str = ""


@dataclass(frozen=True)
class Terms:
    """The terms that a compound may have, and how long those that begin with a letter are: most places have none."""

    names: frozenset[str]
    lengths: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Terms":
        found: dict[str, set[int]] = {}
        every = frozenset(names)
        for name in every:
            found.setdefault(name[:1], set()).add(len(name))
        return cls(every, {first: tuple(sorted(lengths)) for first, lengths in found.items()})


def is_hangul(letter: str) -> bool:
    return "가" <= letter <= "힣"


def is_ending(term: str, ending: str) -> bool:
    """Whether `ending` may stand behind `term` by the grammar of its language; the empty one may."""
    if not ending:
        return True
    return ending in _ENDINGS if is_hangul(term[-1]) else term[-1].isascii() and ending in _PLURALS


def whole_parts(word: str, terms: Terms) -> tuple[Part, ...]:
    """The fewest terms of which the word, in their form, is made: two at least; empty where it is not."""
    parts = _divided(word, lambda start: _terms_at(word, start, terms, fewest_syllables=1, fewest_letters=3))
    return parts if len(parts) > 1 else ()


def known_parts(word: str, terms: Terms) -> tuple[Part, ...]:
    """The terms that cover the most of the word, and the rests around them; empty where no term is in it."""
    if len(word) > _LONGEST_WITH_RESTS:
        return ()

    def parts_at(start: int) -> Iterator[Part]:
        yield from _terms_at(word, start, terms, fewest_syllables=2, fewest_letters=4)
        for end in range(start + 1, len(word) + 1):
            if end - start >= _FEWEST_LETTERS_OF_A_REST or any(map(is_hangul, word[start:end])):
                yield Part(start, end)

    parts = _divided(word, parts_at)
    return parts if any(part.term for part in parts) else ()


def _terms_at(word: str, start: int, terms: Terms, *, fewest_syllables: int, fewest_letters: int) -> Iterator[Part]:
    for length in terms.lengths.get(word[start], ()):
        end, term = start + length, word[start : start + length]
        if end > len(word):
            return
        if term not in terms.names or length < (fewest_syllables if any(map(is_hangul, term)) else fewest_letters):
            continue
        yield Part(start, end, term)
        if 0 < len(word) - end <= LONGEST_ENDING and is_ending(term, word[end:]):
            yield Part(start, len(word), term, word[end:])


def _divided(word: str, parts_at: Callable[[int], Iterable[Part]]) -> tuple[Part, ...]:
    """The parts with the most letters in terms, then the fewest, then the shortest first: 반팔, 티셔츠 and not 반팔티, 셔츠.

    Of a compound the last word says what it is, and no rest follows another.
    """
    # By where the rest of the word begins: letters in terms, parts (negative), and the first of them.
    best: list[tuple[int, int, Part | None] | None] = [*[None] * len(word), (0, 0, None)]
    for start in reversed(range(len(word))):
        for part in parts_at(start):
            after = best[part.end]
            if after is None or not (part.term or after[2] is None or after[2].term):
                continue
            found = (after[0] + len(part.term), after[1] - 1, part)
            known = best[start]
            if known is None or found[:2] > known[:2]:
                best[start] = found
    parts = []
    at = best[0]
    while at is not None and at[2] is not None:
        parts.append(at[2])
        at = best[at[2].end]
    return tuple(parts)
