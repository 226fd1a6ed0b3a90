"""Which images fit which captions: equal ones, and of captions with facts left out those that state the rest."""

from pathlib import Path

import numpy as np

from engine.data.caption_fit import CaptionFit
from engine.data.pairs import Pair


def _pair(*captions: str) -> Pair:
    return Pair(captions[0], Path("x.png"), captions, captions[0], "train")


GREY = "상의에서 색상은 그레이이다."
SHIRT = "상의에서 카테고리는 티셔츠이다."
WHITE_TOO = "상의에서 서브색상은 화이트이다."
LONG = "상의에서 소매기장은 긴팔이다."


def test_equal_captions_fit_each_other_s_images_and_other_whole_ones_do_not() -> None:
    pairs = [_pair(f"{GREY} {SHIRT}"), _pair(f"{SHIRT} {GREY}"), _pair(f"{GREY} {WHITE_TOO} {SHIRT}")]
    fit = CaptionFit(pairs)
    found = fit.matrix([(number, pair.captions[0]) for number, pair in enumerate(pairs)], [0, 1, 2])
    # The third image is a grey T-shirt as well, but the first caption says of its own that it has no second colour.
    assert found.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert found.dtype == np.bool_


def test_a_caption_with_facts_left_out_fits_all_images_that_state_the_rest() -> None:
    pairs = [
        _pair(f"{GREY} {SHIRT} {LONG}", f"{GREY} {SHIRT}"),
        _pair(f"{GREY} {WHITE_TOO} {SHIRT}", GREY),
        _pair("하의에서 색상은 그레이이다. 하의에서 카테고리는 팬츠이다."),
        _pair(f"{GREY} {SHIRT}"),
    ]
    found = CaptionFit(pairs).matrix([(0, f"{GREY} {SHIRT}"), (1, GREY), (3, f"{GREY} {SHIRT}")], [3, 2, 1, 0])
    assert found.tolist() == [
        [True, False, True, True],
        [True, False, True, True],  # trousers are not a top, though grey
        [True, False, False, False],  # the same words as in the first row, but here they are the whole caption
    ]


def test_without_a_grammar_only_equal_captions_fit() -> None:
    pairs = [_pair("A red coat. It is long.", "A red coat."), _pair("A red coat."), _pair("A blue coat.")]
    found = CaptionFit(pairs).matrix(
        [(0, "A red coat. It is long."), (0, "A red coat."), (2, "A blue coat.")], [0, 1, 2]
    )
    assert found.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_a_caption_outside_the_grammar_fits_its_equals_alone() -> None:
    pairs = [_pair(f"{GREY} {SHIRT}"), _pair("아름다운 옷"), _pair("아름다운 옷"), _pair("다른 옷")]
    found = CaptionFit(pairs).matrix([(1, "아름다운 옷"), (3, "다른 옷")], [0, 1, 2, 3])
    assert found.tolist() == [[False, True, True, False], [False, False, False, True]]
