import unicodedata

import pytest

from engine.data.keyboard_layouts import in_other_layout


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gnemxl", "후드티"), ("ghenxl", "호두티"), ("qmffor", "블랙"), ("tmzkdlqmffn", "스카이블루"), ("dhkdls", "와인"), ("dkdnxj", "아우터"),
        ("Qkfrkd", "빨강"), ("gmlsTor", "흰쌕"), ("dksgek", "않다"), ("dkswek", "앉다"), ("rkqtdl", "값이"), ("QKFRKD", "발강"),
        ("ㄱㄷㅇ", "red"), ("ㅗㅐㅐ야ㄷ", "hoodie"), ("노ㅑㄱㅅ", "shirt"), ("ㅠㅣㅕㄷ", "blue"),
    ],
)  # fmt: skip
def test_the_same_keys(typed: str, meant: str) -> None:
    assert in_other_layout(typed) == meant


@pytest.mark.parametrize(
    "word", ["", "xl", "red", "shirt", "a", "가", "ㅁ", "123", "👕", "fpem!", "레d", "レッド", "ᄀ"]
)
def test_what_is_no_word_there(word: str) -> None:
    assert in_other_layout(word) is None


def test_every_syllable_comes_back() -> None:
    """After one without a final, so that where one ends follows from the keys."""
    for number in range(0xAC00, 0xD7A4):
        word = "가" + chr(number)
        typed = in_other_layout(word)
        assert typed is not None
        assert in_other_layout(typed) == word
        assert in_other_layout(unicodedata.normalize("NFD", word)) == typed
