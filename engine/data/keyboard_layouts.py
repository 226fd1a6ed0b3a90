"""Words typed in the other keyboard layout: `ghenxl` is 후드티 and `ㄱㄷㅇ` is red on Korea's two-set (dubeolsik) keyboard.

Source: KS X 5002. In Korea both languages share the keys, and one key turns over to the other; people forget to press it.
"""

import re
import unicodedata

_CONSONANTS = dict(zip("ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ", "rRseEfaqQtTdwWczxvg", strict=True))
_VOWELS = dict(zip("ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅛㅜㅠㅡㅣ", "koiOjpuPhynbml", strict=True))
_KEYS = _CONSONANTS | _VOWELS
_KEYS |= {letter: "".join(_KEYS[part] for part in parts) for letter, parts in (
    ("ㄳ", "ㄱㅅ"), ("ㄵ", "ㄴㅈ"), ("ㄶ", "ㄴㅎ"), ("ㄺ", "ㄹㄱ"), ("ㄻ", "ㄹㅁ"), ("ㄼ", "ㄹㅂ"), ("ㄽ", "ㄹㅅ"), ("ㄾ", "ㄹㅌ"),
    ("ㄿ", "ㄹㅍ"), ("ㅀ", "ㄹㅎ"), ("ㅄ", "ㅂㅅ"),
    ("ㅘ", "ㅗㅏ"), ("ㅙ", "ㅗㅐ"), ("ㅚ", "ㅗㅣ"), ("ㅝ", "ㅜㅓ"), ("ㅞ", "ㅜㅔ"), ("ㅟ", "ㅜㅣ"), ("ㅢ", "ㅡㅣ"),
)}  # fmt: skip
# In Unicode's order of syllables.
_INITIALS = [_KEYS[letter] for letter in "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"]
_MEDIALS = [_KEYS[letter] for letter in "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"]
_FINALS = ["", *(_KEYS[letter] for letter in "ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")]


def _longest_first(keys: list[str]) -> str:
    return "|".join(sorted(filter(None, keys), key=len, reverse=True))


# A consonant before a vowel begins the next syllable.
_SYLLABLE = re.compile(
    f"({_longest_first(_INITIALS)})({_longest_first(_MEDIALS)})(?:({_longest_first(_FINALS)})(?![{''.join(_VOWELS.values())}]))?"
)
_LEAST_SYLLABLES, _LEAST_LETTERS = 2, 3  # shorter ones are other words: XL is 티


def in_other_layout(word: str) -> str | None:
    """What the same keys write in the other layout; None for a word that is none there, or too short to tell."""
    if word.isascii():
        return _hangul(word) or _hangul(word.lower())  # capitals may be those of Caps Lock
    keys = "".join(_keys(letter) or " " for letter in unicodedata.normalize("NFKC", word))
    return None if " " in keys or len(keys) < _LEAST_LETTERS else keys


def _hangul(keys: str) -> str | None:
    syllables, at = [], 0
    while at < len(keys):
        found = _SYLLABLE.match(keys, at)
        if found is None:
            return None
        initial, medial, final = _INITIALS.index(found[1]), _MEDIALS.index(found[2]), _FINALS.index(found[3] or "")
        syllables.append(chr(0xAC00 + (initial * len(_MEDIALS) + medial) * len(_FINALS) + final))
        at = found.end()
    return "".join(syllables) if len(syllables) >= _LEAST_SYLLABLES else None


def _keys(letter: str) -> str | None:
    """The keys of a syllable or of a single letter; None for what is not Hangul."""
    if "가" <= letter <= "힣":
        rest, final = divmod(ord(letter) - 0xAC00, len(_FINALS))
        initial, medial = divmod(rest, len(_MEDIALS))
        return _INITIALS[initial] + _MEDIALS[medial] + _FINALS[final]
    if "ᄀ" <= letter <= "ᄒ":  # what NFKC makes of a consonant that stands alone
        return _INITIALS[ord(letter) - ord("ᄀ")]
    if "ᅡ" <= letter <= "ᅵ":
        return _MEDIALS[ord(letter) - ord("ᅡ")]
    if "ᆨ" <= letter <= "ᇂ":
        return _FINALS[ord(letter) - ord("ᆨ") + 1]
    return None
