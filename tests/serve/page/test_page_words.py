"""Words that the model does not know: marked while they are written, with what to write instead, and said of its images."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine.data.caption_guide import CaptionGuide, training_words
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.kfashion.synonyms import SYNONYMS
from engine.data.tokenizer import train_tokenizer
from serve.api.application import build_api
from serve.messages import Finished, GenerationEvent, GenerationJob
from serve.settings import ServeSettings
from tests.browser_page import (
    CAPTION,
    Open,
    Page,
    Site,
    fill,
    generate,
    needs_chromium,
    playwright,
    stopping,
    wait_done,
)
from tests.live_server import INFO, ScriptedPool, finished

expect = playwright.expect
pytestmark = needs_chromium

CAPTIONS = (
    "상의에서 색상은 스카이블루이다. 상의에서 카테고리는 셔츠이다. 상의에서 소매기장은 반팔이다.",
    "하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다.",
)
# One colour is a value of two subjects: which is meant follows from the others.
GUIDE = CaptionGuide(
    examples=CAPTIONS,
    attributes={
        "상의": {"색상": ["스카이블루", "블랙"], "카테고리": ["셔츠"], "소매기장": ["반팔"]},
        "하의": {"색상": ["블랙"], "카테고리": ["팬츠"]},
    },
    form=kfashion_form(),
    synonyms=SYNONYMS,
    words=training_words(CAPTIONS),
)


@pytest.fixture(scope="module")
def words_site() -> Iterator[Site]:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=400).to_json()
    pool = ScriptedPool(info=replace(INFO, tokenizer_json=tokenizer, caption_guide=GUIDE))
    with stopping(Site(lambda: build_api(pool, ServeSettings()))) as site:
        yield site


@pytest.fixture
def words_page(open_in: Open, words_site: Site) -> Iterator[Page]:
    with open_in(words_site) as (page, _):
        yield page


def test_unknown_words_are_marked_and_one_press_writes_what_is_known(words_page: Page) -> None:
    page = words_page
    caption, place = page.locator("#caption"), page.locator("#caption-unknown")
    expect(place).to_be_hidden()
    caption.fill("봄에 입는 하늘색 남방")
    expect(place.locator("mark")).to_have_text(["봄에", "입는", "하늘색", "남방"])
    expect(page.locator("#caption-unknown-text")).to_contain_text("아는 말이 하나도 없습니다")
    page.get_by_role("button", name="하늘색 대신 색상: 스카이블루 쓰기").click()
    expect(caption).to_have_value("봄에 입는 남방 상의에서 색상은 스카이블루이다.")
    expect(caption).to_be_focused()  # the button is gone
    expect(place.locator("mark")).to_have_text(["봄에", "입는", "남방"])
    page.get_by_role("button", name="아는 말로 바꾼 이 설명 쓰기").click()
    expect(caption).to_have_value("상의에서 색상은 스카이블루이다. 상의에서 카테고리는 셔츠이다.")
    expect(place).to_be_hidden()


def test_a_slip_in_a_sentence_is_mended_in_its_place(words_page: Page) -> None:
    page = words_page
    page.locator("#caption").fill("상의애서 색상은 하늘색이다.")
    page.get_by_role("button", name="상의애서 대신 상의에서 쓰기").click()
    expect(page.locator("#caption")).to_have_value("상의에서 색상은 하늘색이다.")


def test_the_parts_of_a_compound_are_written_apart(words_page: Page) -> None:
    page = words_page
    caption, marks = page.locator("#caption"), page.locator("#caption-unknown mark")
    caption.fill("상의에서색상은 블랙셔츠")
    expect(marks).to_have_text(["상의에서", "색상은", "블랙", "셔츠"])
    page.get_by_role("button", name="상의에서 대신 상의에서 쓰기").click()
    expect(caption).to_have_value("상의에서 색상은 블랙셔츠")
    expect(marks).to_have_text(["블랙", "셔츠"])
    page.get_by_role("button", name="아는 말로 바꾼 이 설명 쓰기").click()
    expect(caption).to_have_value("상의에서 색상은 블랙이다. 상의에서 카테고리는 셔츠이다.")


def test_english_words_compose_the_caption_that_the_model_reads(words_page: Page) -> None:
    page = words_page
    page.locator("#language-button").click()
    page.locator("#caption").fill("black trousers with pockets")
    expect(page.get_by_role("button", name="Write Colour: Black for black")).to_be_visible()
    page.get_by_role("button", name="Use this caption").click()
    expect(page.locator("#caption")).to_have_value("하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다.")
    expect(page.locator("#caption-reading")).to_have_text("Bottom: Colour Black · Category Trousers")


def test_a_press_never_takes_back_what_was_typed_meanwhile(words_page: Page) -> None:
    page = words_page
    page.locator("#caption").fill("하늘색")
    offer = page.get_by_role("button", name="하늘색 대신 색상: 스카이블루 쓰기")
    offer.wait_for()
    page.route("**/v1/tokenize", lambda route: route.abort())
    page.evaluate(
        """() => {
          const box = document.getElementById("caption");
          box.value = "하늘색 그리고";
          document.querySelector("#caption-unknown button").click();
        }"""
    )
    expect(page.locator("#caption")).to_have_value("하늘색 그리고")


# ------------------------------------------------------------------------------------------------------------- verdicts


def _scored(percentile: float | None) -> Any:
    async def script(job: GenerationJob) -> Any:
        done = finished(job, data=PIXEL)
        images = tuple(replace(image, score_percentile=percentile) for image in done.images)
        event: GenerationEvent = replace(done, images=images)
        assert isinstance(event, Finished)
        yield event

    return script


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


@pytest.mark.parametrize(
    ("words", "percentile", "prompt", "short", "sentence", "warning"),
    [
        ("a b", 83.6, "a b", "83%", "83%보다 잘 맞습니다", None),
        ("a b", 83.6, "a 레두", "83% · 1/2", "말 2개 가운데 1개만 읽었습니다", "레두"),
        ("a b", None, "레두 티셔쓰", "읽지 못함", "판단할 수 없음", "레두, 티셔쓰"),
        ("a b", None, "a b", "0.500", "KoCLIP 점수 0.500", None),
    ],
)
def test_a_score_is_a_place_among_real_pairs_beside_what_was_read(
    open_in: Open, words: str, percentile: float | None, prompt: str, short: str, sentence: str, warning: str | None
) -> None:
    """Nonsense never looks like a good fit, whatever its score."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0} | {word: n for n, word in enumerate(words.split(), 1)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    info = replace(INFO, tokenizer_json=str(tokenizer.to_str()), caption_guide=CaptionGuide())
    pool = ScriptedPool(script=_scored(percentile), info=info)
    with stopping(Site(lambda: build_api(pool, ServeSettings()))) as site, open_in(site) as (page, _):
        generate(page, prompt, n=1, candidates=1)
        wait_done(page)
        score = page.locator(".score")
        expect(score.locator("[aria-hidden]")).to_have_text(short)
        expect(score.locator(".visually-hidden")).to_contain_text(sentence)
        said = page.locator(".card .warning")
        if warning is None:
            expect(said).to_have_count(0)
        else:
            expect(said).to_contain_text(warning)
        page.get_by_role("button", name="크게 보기").first.click()
        expect(page.locator(".verdict")).to_contain_text(sentence)


def test_a_strict_server_refuses_in_the_pages_language(open_in: Open) -> None:
    pool = ScriptedPool(info=replace(INFO, caption_guide=CaptionGuide()))
    with (
        stopping(Site(lambda: build_api(pool, ServeSettings(strict=True)))) as site,
        open_in(site) as (page, complaints),
    ):
        complaints.may_fail = True
        generate(page, CAPTION)
        expect(page.locator(".card .fault")).to_contain_text("모델이 모르는 말이 있습니다")
        fill(page, CAPTION)
