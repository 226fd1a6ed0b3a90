import json
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.clean_json import read_clean_json
from engine.errors import printable
from engine.text import (
    MAX_CHARACTERS,
    TEXT_PATTERN,
    VISIBLE_TEXT_PATTERN,
    TextFault,
    clean_name,
    clean_text,
    is_clean_name,
    shown,
)

NFD = unicodedata.normalize("NFD", "빨간 셔츠")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NFD, "빨간 셔츠"),
        ("\ufeff빨간 셔츠", "빨간 셔츠"),
        ("빨\u200b간\u00ad 셔\u2060츠", "빨간 셔츠"),
        ("\u202b빨간 셔츠\u202c\u200f", "빨간 셔츠"),  # direction marks
        ("가\u200b\u11a8", "각"),  # what becomes adjacent is composed
        ("❤\ufe0f 👩\u200d🚀", "❤ 👩🚀"),
        ("  a\tred \r\n\u3000shirt\u00a0\u2028", "a red shirt"),
        ("\u06dd", "\u06dd"),  # a format character that is visible
        ("\u200b \u3164\ufeff", ""),
        ("\u2800 \u2800", ""),
        ("", ""),
    ],
)
def test_texts_that_look_alike_have_one_form(text: str, expected: str) -> None:
    assert clean_text(text) == expected
    assert clean_text(expected) == expected


@pytest.mark.parametrize(
    ("text", "defect", "reason"),
    [
        ("a\0b", "bad_characters", "control character U.0000"),
        ("a\x1b[31m", "bad_characters", "control character U.001B"),
        ("a\x85b", "bad_characters", "control character U.0085"),
        ("\udcb0a", "bad_characters", r"byte \\xb0, which is not UTF-8"),
        ("a\ud800", "bad_characters", "half a character"),
        ("a\ufffe", "bad_characters", "U.FFFE, which is no character"),
        ("\U0010ffff", "bad_characters", "U.10FFFF, which is no character"),
        ("a\ufffd", "replacement_characters", "characters were lost"),
        ("e" + "\u0301\u0316" * 16, "bad_characters", "combining marks in a row"),
        ("\u0301\u034f" * 31, "bad_characters", "combining marks in a row"),  # dropped joiners between
        ("x" * (MAX_CHARACTERS + 1), "too_long", "10,001 characters"),
    ],
)
def test_characters_that_no_text_has_are_named(text: str, defect: str, reason: str) -> None:
    with pytest.raises(TextFault, match=reason) as raised:
        clean_text(text, field="prompt")
    assert (raised.value.field, raised.value.defect) == ("prompt", defect)
    assert str(raised.value).isprintable()
    str(raised.value).encode("utf-8")


def test_names_keep_their_white_space() -> None:
    assert clean_name("a  b\u200b") == "a  b"


@pytest.mark.parametrize("pattern", ["\u0301\u0316", "\u0344", "\U0001d165\U0001d16e", "\u0f71\u0f72"])
def test_marks_in_a_row_are_never_sorted_in_quadratic_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normalized: list[int] = []

    def counting(form: Any, text: str) -> str:
        normalized.append(len(text))
        return text

    monkeypatch.setattr(unicodedata, "normalize", counting)
    monkeypatch.setattr(unicodedata, "is_normalized", lambda form, text: counting(form, text) == text)
    for text in ("a" + pattern * 16_000, ("a" + pattern * 40) * 100):
        with pytest.raises(TextFault):
            clean_text(text)
        is_clean_name(text)
    assert max(normalized, default=0) <= MAX_CHARACTERS


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet=st.one_of(st.characters(), st.sampled_from("가\u1100\u1161\u11a8\u200b\u0301\u0316\u3164\ufeff \n"))
    )
)
def test_the_form_is_stable_and_composed(text: str) -> None:
    try:
        cleaned = clean_text(text)
    except TextFault:
        assert not is_clean_name(text) or len(text) > MAX_CHARACTERS
        return
    assert clean_text(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert is_clean_name(cleaned)
    assert clean_text(unicodedata.normalize("NFD", text)) == cleaned


def test_messages_can_be_printed_anywhere() -> None:
    assert printable("옷.jpg".encode("cp949").decode("utf-8", "surrogateescape")) == "\\xbf\\xca.jpg"
    assert printable("a\u200b\n\ud800") == "a\\u200b\\n\\ud800"
    assert shown("가" * 100) == "'" + "가" * 59 + "…'"


# -------------------------------------------------------------------------------------------------------------- JSON


def test_the_texts_of_json_have_their_form_however_they_are_written() -> None:
    expected = {"빨간 셔츠": ["빨간 셔츠", 1]}
    for ensure_ascii in (True, False):
        assert read_clean_json(json.dumps({NFD + "\u200b": [NFD, 1]}, ensure_ascii=ensure_ascii)) == expected
        assert read_clean_json(json.dumps(expected, ensure_ascii=ensure_ascii)) == expected
    assert read_clean_json(json.dumps({"image": NFD, "a": NFD}), file_name="image") == {"image": NFD, "a": "빨간 셔츠"}


@pytest.mark.parametrize("value", ["\ud800", "a\0", "\ufdd0"])
def test_characters_that_no_text_has_are_found_behind_escapes(value: str) -> None:
    with pytest.raises(TextFault):
        read_clean_json(json.dumps({"a": [{"b": value}]}))


@pytest.mark.parametrize("text", ["1" * 5000, '{"a": -' + "1" * 5000 + "}", "[" * 200_000, "{", "nul", ""])
def test_everything_else_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"digits|nested|Expecting"):
        read_clean_json(text)


def test_patterns_for_json_schema_say_the_same_of_every_character() -> None:
    for number in (*range(0xD800), *range(0xE000, 0x10000)):
        letter = chr(number)
        try:
            text: str | None = clean_text(letter)
        except TextFault:
            text = None
        assert (re.search(TEXT_PATTERN, letter) is not None) == (text is not None), f"U+{number:04X}"
        assert (re.search(VISIBLE_TEXT_PATTERN, letter) is not None) == bool(text), f"U+{number:04X}"
    assert re.search(TEXT_PATTERN, "")
    assert re.search(VISIBLE_TEXT_PATTERN, "\n 옷 \u200b")
