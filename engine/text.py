"""The normal form of captions, prompts, names and metadata.

Two texts that look alike have one form here, and with it the same tokens, keys and images, whichever tokenizer reads them:

    composed        NFC: Hangul from macOS and from some archives comes as single letters
    visible         format characters and Unicode's other default-ignorable ones are dropped: byte order marks, zero-width
                    spaces, soft hyphens, direction marks, variation selectors, Hangul fillers. Joiners too: an emoji sequence
                    or a Persian word reads the same to a model that has learned captions without them as well
    clean           control characters, lone surrogates, noncharacters and U+FFFD are refused: characters were lost there
    one line        white space of any kind and length is one space, none at the ends (captions and prompts, not names)

Length is bounded before anything is composed, and so are combining marks in a row: Python's NFC sorts these by insertion, and
32,000 of them take it a second.
"""

import re
import unicodedata
from typing import Literal

from engine.errors import BYTES, InputError, printable

MAX_CHARACTERS = 10_000
MAX_MARKS = 30  # combining marks in a row: no language needs more (Unicode Standard Annex 15, stream-safe text)
REPLACEMENT = "\ufffd"  # what a careless conversion leaves in place of a character

TextDefect = Literal["bad_characters", "replacement_characters", "too_long"]

_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_REFUSED = re.compile(f"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{REPLACEMENT}{_NONCHARACTERS}]")
# Default_Ignorable_Code_Point, and the rest of category Cf but for the signs that stand before numbers, which are visible.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# So many characters in a row that may all be marks; only then each one is looked up.
_PERHAPS_MARKS = re.compile(
    "[^\0-\u02ff\u1100-\u11ff\u3000-\u3029\u3040-\u3098\u309b-\ua66e\uac00-\ufb1d\ufb1f-\ufe1f\ufe30-\uffff]"
    f"{{{MAX_MARKS + 1}}}"
)
_BRAILLE_BLANK = "\u2800"
# The same for JSON Schema, whose patterns are JavaScript's: characters of the Basic Multilingual Plane, without counting marks.
_TAKEN = r"[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufdd0-\ufdef\ufffd-\uffff]"
_SEEN = (
    r"[^\s\u0000-\u001f\u007f-\u009f\ufdd0-\ufdef\ufffd-\uffff\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb]"
)
TEXT_PATTERN, VISIBLE_TEXT_PATTERN = f"^{_TAKEN}*$", f"^{_TAKEN}*{_SEEN}{_TAKEN}*$"


class TextFault(InputError):
    """A text that cannot be used; `defect` is one word for reports."""

    def __init__(self, field: str, text: str, defect: TextDefect, remedy: str) -> None:
        self.defect: TextDefect = defect
        super().__init__(field, shown(text), remedy)


def clean_text(text: str, *, field: str = "caption") -> str:
    """The normal form of a caption or prompt: one line, "" where nothing is visible.

    Args:
        field: for errors.

    Raises:
        TextFault: (an InputError) characters that no text has, or more than `MAX_CHARACTERS`.
    """
    line = " ".join(clean_name(text, field=field).split())
    return line if line.strip(f"{_BRAILLE_BLANK} ") else ""


def clean_name(name: str, *, field: str = "name") -> str:
    """The normal form of a name or label value: as `clean_text`, white space as it is. Raises TextFault."""
    if len(name) > MAX_CHARACTERS:
        remedy = f"has {len(name):,} characters: shorten it to at most {MAX_CHARACTERS:,}"
        raise TextFault(field, name, "too_long", remedy)
    refused = _REFUSED.search(name)
    if refused is not None:
        raise TextFault(field, name, *_refusal(refused[0]))
    if name.isascii():
        return name
    visible = _INVISIBLE.sub("", name)
    if _has_many_marks(visible):
        remedy = f"has more than {MAX_MARKS} combining marks in a row: remove them"
        raise TextFault(field, name, "bad_characters", remedy)
    return unicodedata.normalize("NFC", visible)


def is_clean_name(text: str) -> bool:
    """Whether a text of any length, and with it each of its parts, is as `clean_name` would have it."""
    if _REFUSED.search(text) is not None:
        return False
    if text.isascii():
        return True
    is_visible = _INVISIBLE.search(text) is None and not _has_many_marks(text)
    return is_visible and unicodedata.is_normalized("NFC", text)


def name_form(name: str) -> str:
    """`clean_name`, or the name as it is where that would refuse it: for comparing names of files."""
    try:
        return clean_name(name)
    except TextFault:
        return name


def shown(text: str, limit: int = 60) -> str:
    """A text for a message: short, on one line, and what cannot be seen in it escaped."""
    return f"'{printable(text if len(text) <= limit else f'{text[: limit - 1]}…')}'"


def _has_many_marks(text: str) -> bool:
    """Whether more than `MAX_MARKS` combining marks follow each other."""
    if _PERHAPS_MARKS.search(text) is None:
        return False
    in_a_row = 0
    for letter in text:
        in_a_row = in_a_row + 1 if unicodedata.combining(letter) else 0
        if in_a_row > MAX_MARKS:
            return True
    return False


def _refusal(letter: str) -> tuple[TextDefect, str]:
    number = ord(letter)
    name = f"U+{number:04X}"
    if letter == REPLACEMENT:
        return "replacement_characters", f"has {name} where characters were lost: take the original"
    if number in BYTES:
        return "bad_characters", f"has the byte \\x{number - 0xDC00:02x}, which is not UTF-8: convert it"
    if 0xD800 <= number < 0xE000:
        return "bad_characters", f"has half a character ({name} alone): take the original"
    if unicodedata.category(letter) == "Cc":
        return "bad_characters", f"has the control character {name}: remove it"
    return "bad_characters", f"has {name}, which is no character: remove it"
