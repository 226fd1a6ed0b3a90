"""Several images at once on the designers' page: a grid over attributes, a list of captions, and both as one picture."""

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from engine.pipeline.ai_marks import xmp_packet
from engine.pipeline.image_encoding import read_metadata
from tests.browser_page import (
    CAPTION,
    MakeSlow,
    Open,
    Page,
    Site,
    StepGate,
    downloaded,
    fill,
    module,
    needs_chromium,
    open_page,
    pixels,
    playwright,
    wait_until,
)

expect = playwright.expect
pytestmark = needs_chromium

BASE = "상의에서 카테고리는 셔츠이다. 예쁜 옷"


def _choose(page: Page, number: int, attribute: str, values: set[str]) -> None:
    """An attribute of the grid with these values alone."""
    page.locator(f"#several-axis-{number}").select_option(attribute)
    page.locator(f"input[id^='several-{attribute}-']").evaluate_all(
        "(boxes, values) => boxes.filter((box) => box.checked !== values.includes(box.value)).forEach((box) => box.click())",
        sorted(values),
    )


def _open_fold(page: Page) -> None:
    page.locator("#several").evaluate("fold => (fold.open = true)")


def _list(page: Page, lines: list[str]) -> None:
    _open_fold(page)
    if page.locator("#several-kind-list").count():
        page.locator("#several-kind-list").check(force=True)
    page.locator("#several-lines").fill("\n".join(lines))


def test_a_grid_is_the_caption_with_each_pair_of_values_and_one_seed(form_page: Page, form_site: Site) -> None:
    page = form_page
    fill(page, BASE, n=4, candidates=2, seed=str(2**64 - 1))
    _open_fold(page)
    _choose(page, 0, "상의/카테고리", {"셔츠", "티셔츠"})
    _choose(page, 1, "상의/색상", {"레드", "블랙", "화이트"})
    expect(page.locator("#several-count")).to_have_text("이미지 6장, 후보까지 12장을 생성합니다.")
    page.locator("#several-make").click()
    expect(page.locator(".sheet .cell.done")).to_have_count(6)
    expect(page.locator(".sheet .state")).to_have_text("6칸 가운데 6칸")
    heads = page.locator(".sheet-table [scope=col]").all_text_contents()
    names = page.locator(".sheet-table [scope=row]").all_text_contents()
    assert (set(heads), set(names)) == ({"레드", "블랙", "화이트"}, {"셔츠", "티셔츠"})
    name, content = downloaded(page, page.locator("[data-action=sheet-download]").click)
    assert name == f"kodalle-sheet-{2**64 - 1}.png"
    picture = Image.open(io.BytesIO(content))
    texts: Any = picture.text  # type: ignore[attr-defined]
    assert texts["XML:com.adobe.xmp"] == xmp_packet("trainedAlgorithmicMedia")
    assert read_metadata(content) is None  # it is no image of the model, so none can be made again from it
    cells = json.loads(texts["sheet"])["images"]
    wanted = [
        f"상의에서 색상은 {colour}이다. 상의에서 카테고리는 {kind}이다. 예쁜 옷" for kind in names for colour in heads
    ]
    # sentences stand in the form's order, and one's own words stay where they are
    found = [cell["provenance"]["caption"] for cell in sorted(cells, key=lambda cell: cell["cell"])]
    assert [set(each.split(". ")) for each in found] == [set(each.split(". ")) for each in wanted]
    assert {cell["provenance"]["seed"] for cell in cells} == {2**64 - 1}
    # every cell is what a program gets for its caption, and stands at its place
    number = next(number for number, each in enumerate(found) if "레드" in each and "티셔츠" in each)
    page.locator(f"[data-cell='{number}'] button").click()
    image = pixels(downloaded(page, page.locator("#viewer [data-action=download]").click)[1])
    page.keyboard.press("Escape")
    answer = form_site.post(
        "/v1/images/generations", {"prompt": found[number], "candidates": 2, "seed": 2**64 - 1, "temperature": 0.7}
    )
    assert (pixels(base64.b64decode(answer["data"][0]["b64_json"])) == image).all()
    assert _shown_in(pixels(content), image)


def _shown_in(sheet: np.ndarray[Any, Any], image: np.ndarray[Any, Any]) -> bool:
    """Whether the sheet shows the image at four times its size, somewhere."""
    large = image.repeat(4, 0).repeat(4, 1)
    side = len(large)
    rows, columns = sheet.shape[0] - side + 1, sheet.shape[1] - side + 1
    corners = (sheet[:rows, :columns] == large[0, 0]).all(2) & (sheet[side - 1 :, side - 1 :] == large[-1, -1]).all(2)
    return any((sheet[y : y + side, x : x + side] == large).all() for y, x in np.argwhere(corners))


def test_one_attribute_is_a_row_of_labelled_images_in_the_language_shown(form_page: Page) -> None:
    page = form_page
    fill(page, "", candidates=1, n=1)
    _open_fold(page)
    _choose(page, 0, "하의/기장", {"발목", "미니"})
    page.locator("#several-axis-1").select_option("")
    page.locator("#several-make").click()
    expect(page.locator(".sheet .cell.done")).to_have_count(2)
    page.locator("#language-button").click()
    labels = page.locator(".sheet .cell-label").all_text_contents()
    assert "Mini" in labels
    expect(page.locator(".sheet h3")).to_have_text("Length")
    expect(page.locator(".sheet .cell button").first).to_have_attribute("aria-label", f"Enlarge: {labels[0]}")


def test_no_value_and_too_many_cells_are_refused_in_words(form_page: Page) -> None:
    page = form_page
    _open_fold(page)
    _choose(page, 0, "상의/카테고리", set())
    expect(page.locator("#several-fault")).to_have_text("속성마다 값을 하나 이상 고르세요.")
    expect(page.locator("#several-make")).to_be_disabled()
    page.locator("#several-axis-0").select_option("하의/색상")
    page.locator("#several-axis-1").select_option("상의/색상")
    expect(page.locator("#several-fault")).to_contain_text("120칸까지")
    expect(page.locator("#several-make")).to_be_disabled()


def test_a_list_shows_each_caption_with_its_best_images_and_names_a_bad_line(page: Page) -> None:
    fill(page, "", n=2, candidates=3, seed="5")
    _list(page, ["빨강 네모", "", "가" * 203])
    expect(page.locator("#several-fault")).to_contain_text("3번째 줄: 3자가 넘쳤습니다")
    _list(page, ["  빨강   네모 ", "", CAPTION])
    page.locator("#several-make").click()
    expect(page.locator(".sheet .cell.done")).to_have_count(2)
    expect(page.locator(".sheet .cell-caption p:first-child")).to_have_text(["빨강 네모", CAPTION])
    expect(page.locator(".sheet .cell-images img")).to_have_count(4)
    _, content = downloaded(page, page.locator("[data-action=sheet-download]").click)
    texts: Any = Image.open(io.BytesIO(content)).text  # type: ignore[attr-defined]
    images = json.loads(texts["sheet"])["images"]
    assert [(each["cell"], each["provenance"]["caption"]) for each in images] == [
        *[(0, "빨강 네모")] * 2,
        *[(1, CAPTION)] * 2,
    ]


def _step_until_one_is_done(page: Page, gate: StepGate) -> None:
    """Step by step: how many tokens a step gives is the decoder's to choose, and steps that are left would serve the next cell."""
    done = page.locator(".sheet .cell.done")
    for _ in range(64):
        gate.allow(1)
        page.wait_for_timeout(50)
        if done.count():
            break
    expect(done).to_have_count(1)


def test_a_sheet_goes_on_after_a_reload_and_after_it_was_cancelled(
    open_in: Open, slow_site: MakeSlow, gate: StepGate
) -> None:
    site, pool = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        fill(page, "", n=1, candidates=1, seed="")
        _list(page, ["빨강", "파랑", "초록", CAPTION])
        page.locator("#several-make").click()
        seed = page.locator(".sheet .facts").get_by_text("시드").inner_text()
        _step_until_one_is_done(page, gate)
        page.reload()
        card = page.locator(".card.sheet")
        expect(card).to_have_count(1)
        expect(card.locator(".cell.done")).to_have_count(1)
        expect(card.locator(".state")).to_have_text("4칸 가운데 1칸")
        card.locator("[data-action=cancel]").click()
        expect(card.locator(".cell.cancelled")).to_have_count(3)
        gate.open()
        wait_until(lambda: pool.worker.slots_in_use == pool.worker.queued_sequences == 0)
        card.get_by_role("button", name="남은 3칸 이어서 생성").click()
        expect(card.locator(".cell.done")).to_have_count(4)
        expect(card.locator(".facts").get_by_text("시드")).to_have_text(seed)
        expect(card.locator(".cell-caption p:first-child")).to_have_text(["빨강", "파랑", "초록", CAPTION])
        open_page(page, site.address)
        expect(page.locator(".sheet .cell.done")).to_have_count(4)  # kept, and shown as one sheet
        expect(page.locator(".card")).to_have_count(1)


def test_a_single_request_does_not_wait_for_a_sheet(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    site, _ = slow_site()
    with open_in(site) as (page, _):
        fill(page, "초록 네모", n=1, candidates=1)
        _list(page, ["빨강"] * 6)
        page.locator("#several-make").click()
        page.locator("#generate").click()
        states = page.locator(".card:not(.sheet) .state")
        expect(states).to_have_text("앞 작업을 기다리는 중")
        _step_until_one_is_done(page, gate)  # the next is the single one
        expect(states).not_to_have_text("앞 작업을 기다리는 중")
        expect(page.locator(".sheet .cell.waiting")).to_have_count(4)
        gate.open()


def test_one_composite_makes_a_sheet_a_composite(page: Page) -> None:
    whole, composite = xmp_packet("trainedAlgorithmicMedia"), xmp_packet("compositeWithTrainedAlgorithmicMedia")
    body = "return a.map(m.commonMark);"
    cases: list[list[str]] = [[whole, whole], [whole, "", composite], ["", whole], [""], []]
    assert module(page, "png_text", body, cases) == [whole, composite, whole, "", ""]


def test_png_texts_are_read_and_written_as_the_engine_does(page: Page) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(file, format="PNG")
    body = """
      const file = m.withTexts(Uint8Array.from(a), new Map([["provenance", '{"caption": "빨강"}'], ["sheet", "x"]]));
      return [Array.from(file), [...m.readTexts(file)], m.readTexts(new Uint8Array(40)), [...m.readTexts(file.subarray(0, 60))]];
    """
    written, texts, foreign, cut = module(page, "png_text", body, list(file.getvalue()))
    assert texts == [["provenance", '{"caption": "빨강"}'], ["sheet", "x"]]
    assert (foreign, cut) == (None, [])
    assert read_metadata(bytes(written)) == {"caption": "빨강"}
    assert (pixels(bytes(written)) == pixels(file.getvalue())).all()
    with Image.open(io.BytesIO(bytes(written))) as image:
        image.verify()  # checks every CRC
