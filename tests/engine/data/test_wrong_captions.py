"""Wrong captions are wrong in one fact, and nothing that their image shows is taken for wrong."""

import numpy as np
import pytest

from engine.data.wrong_captions import Question, WrongCaptions, wrong_captions, wrong_captions_of_model

GREY, BLACK = "상의에서 색상은 그레이이다.", "상의에서 색상은 블랙이다."
WHITE_TOO, BLUE_TOO = "상의에서 서브색상은 화이트이다.", "상의에서 서브색상은 블루이다."
EXCHANGED = "상의에서 색상은 화이트이다. 상의에서 서브색상은 그레이이다."
WHITE_ALONE = "상의에서 색상은 화이트이다."
SHIRT, HOODIE = "상의에서 카테고리는 셔츠이다.", "상의에서 카테고리는 후드티이다."
SHORT, LONG = "상의에서 소매기장은 반팔이다.", "상의에서 소매기장은 긴팔이다."
TROUSERS, DRESS = "하의에서 카테고리는 팬츠이다.", "원피스에서 카테고리는 드레스이다."
GREY_TROUSERS, BLACK_TROUSERS = "하의에서 색상은 그레이이다.", "하의에서 색상은 블랙이다."


def _versions(wrong: WrongCaptions, caption: str, count: int = 200) -> list[str | None]:
    return [wrong.sample(caption, np.random.default_rng([5, number])) for number in range(count)]


def test_one_fact_is_another_s_or_two_colours_change_places() -> None:
    wrong = wrong_captions([f"{GREY} {WHITE_TOO} {SHIRT}", f"{BLACK} {HOODIE}", TROUSERS])
    assert wrong is not None
    found = _versions(wrong, f"{GREY} {WHITE_TOO} {SHIRT}")
    expected = [f"{EXCHANGED} {SHIRT}", f"{BLACK} {WHITE_TOO} {SHIRT}", f"{GREY} {WHITE_TOO} {HOODIE}"]
    assert set(found) == set(expected)  # never the second colour alone: all captions that state one state white
    assert min(found.count(version) for version in expected) > 200 / 3 * 0.7


def test_questions_ask_for_each_fact_the_class_and_which_colour_is_the_main_one() -> None:
    wrong = wrong_captions([f"{GREY} {WHITE_TOO} {SHIRT} {SHORT}", f"{BLACK} {BLUE_TOO} {HOODIE} {LONG}", TROUSERS])
    assert wrong is not None
    whole = f"{GREY} {WHITE_TOO} {SHIRT} {SHORT}"
    assert wrong.questions(whole, most=9) == [
        Question(f"{GREY} {SHIRT} {SHORT}", (f"{BLACK} {SHIRT} {SHORT}",)),  # without the second colour
        Question(whole, (f"{GREY} {BLUE_TOO} {SHIRT} {SHORT}",)),
        Question(f"{GREY} {SHIRT} {SHORT}", (f"{GREY} {SHIRT} {LONG}",)),
        Question(f"{GREY} {SHIRT}", (f"{GREY} {HOODIE}", TROUSERS)),  # no trousers are known to be grey
        Question(whole, (f"{EXCHANGED} {SHIRT} {SHORT}",)),
        Question(whole, (f"{WHITE_ALONE} {SHIRT} {SHORT}",)),
    ]


def test_the_class_is_asked_among_those_of_subjects_that_the_caption_does_not_state() -> None:
    wrong = wrong_captions([f"{GREY} {SHIRT} {BLACK_TROUSERS}", f"{GREY_TROUSERS} {TROUSERS}", DRESS])
    assert wrong is not None
    assert wrong.questions(f"{GREY} {SHIRT}", most=9)[-1] == Question(
        f"{GREY} {SHIRT}", (f"{GREY_TROUSERS} {TROUSERS}", DRESS)
    )
    # trousers are in the image beside the shirt, so neither is wrong in the other's place
    questions = wrong.questions(f"{GREY} {SHIRT} {TROUSERS}", most=9)
    assert questions == [Question(f"{GREY} {SHIRT}", (DRESS,)), Question(TROUSERS, (DRESS,))]


def test_where_no_class_is_stated_other_subjects_are_asked_for() -> None:
    wrong = wrong_captions([f"{GREY} {SHIRT}", f"{GREY_TROUSERS} {TROUSERS}", f"{BLACK} {SHORT}", DRESS])
    assert wrong is not None
    assert wrong.questions(GREY, most=9) == [Question(GREY, (BLACK,)), Question(GREY, (GREY_TROUSERS,))]
    assert wrong.questions(SHORT, most=9) == []  # only tops have sleeves here, and these one length


def test_values_are_drawn_as_often_as_captions_state_them() -> None:
    wrong = wrong_captions([*[GREY] * 30, *[BLACK] * 60, *["상의에서 색상은 와인이다."] * 10])
    assert wrong is not None
    found = _versions(wrong, GREY, 700)
    assert set(found) == {BLACK, "상의에서 색상은 와인이다."}
    assert found.count(BLACK) / 700 == pytest.approx(6 / 7, abs=0.05)


def test_a_model_s_values_come_in_their_order_the_first_of_each_fact_first() -> None:
    known = {"상의": {"색상": ["그레이", "블랙", "레드"], "카테고리": ["후드티", "셔츠", "탑"]}}
    wrong = wrong_captions_of_model([GREY], known)
    assert wrong is not None
    asked, colours = f"{GREY} {SHIRT}", (f"{BLACK} {SHIRT}", f"상의에서 색상은 레드이다. {SHIRT}")
    kinds = (f"{GREY} {HOODIE}", f"{GREY} 상의에서 카테고리는 탑이다.")
    assert wrong.questions(asked, most=1) == [Question(asked, colours[:1])]
    assert wrong.questions(asked, most=3) == [Question(asked, colours), Question(asked, kinds[:1])]
    assert wrong.questions(asked, most=99) == [Question(asked, colours), Question(asked, kinds)]
    # what is asked about two colours comes before the values of any fact
    both = f"{GREY} {WHITE_TOO} {SHIRT}"
    of_colours = [Question(both, (f"{EXCHANGED} {SHIRT}",)), Question(both, (f"{WHITE_ALONE} {SHIRT}",))]
    assert wrong.questions(both, most=3) == [Question(asked, colours[:1]), *of_colours]
    assert wrong.questions(both, most=1) == of_colours[:1]
    assert wrong_captions_of_model(["A red coat."], {}) is None


def test_what_the_grammar_or_the_values_do_not_know_stays() -> None:
    wrong = wrong_captions([GREY, BLACK])
    assert wrong is not None
    assert _versions(wrong, "아름다운 옷", 3) == [None, None, None]
    assert _versions(wrong, SHIRT, 3) == [None, None, None]  # an attribute that no caption of the split states
    assert wrong.questions("아름다운 옷", most=9) == wrong.questions(SHIRT, most=9) == []


@pytest.mark.parametrize("captions", [("A red coat.", "A blue coat."), (GREY, GREY)])
def test_captions_without_anything_to_change_have_none(captions: tuple[str, ...]) -> None:
    assert wrong_captions(captions) is None
