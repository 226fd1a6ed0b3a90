"""Sentences left out of captions of any kind."""

import numpy as np

from engine.data.caption_grammar import leave_out


def test_every_choice_of_sentences_occurs() -> None:
    generator = np.random.default_rng(0)
    text = "A coat. Is it red? Yes! 두 번째 옷이다"
    found = {leave_out(text, generator, None) for _ in range(300)}
    assert len(found) == 2**4 - 2  # all but none and all
    assert {"A coat.", "Is it red? 두 번째 옷이다"} <= found
    assert leave_out("a coat, 1.5 m long", generator, None) == "a coat, 1.5 m long"
    assert leave_out("", generator, None) == ""


def test_without_a_grammar_no_word_is_repeated() -> None:
    text = "공원에서 아이가 뛴다. 하늘은 맑다. 나무는 푸르다."
    generator = np.random.default_rng(0)
    assert {leave_out(text, generator, None).count("공원에서") for _ in range(40)} == {0, 1}
    assert "하늘은 맑다." in {leave_out(text, generator, None) for _ in range(40)}
