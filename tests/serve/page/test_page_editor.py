"""The designers' page generates from an init image: the top kept, a part painted over, or the user's own photo."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from engine.pipeline.image_encoding import read_metadata
from tests.browser_page import (
    CAPTION,
    Open,
    Page,
    Site,
    downloaded,
    generate,
    module,
    needs_chromium,
    pixels,
    playwright,
    wait_done,
)

pytestmark = needs_chromium
expect = playwright.expect


def _drag(page: Page, places: list[tuple[float, float]]) -> None:
    """Along places given as shares of the stage's width and height."""
    box = page.locator("canvas.stage").bounding_box()
    for number, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def test_what_is_painted_is_regenerated_and_the_rest_stays_to_the_bit(page: Page) -> None:
    generate(page, CAPTION)
    wait_done(page)
    before = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").click)[1])
    page.locator("#generations [data-action=open-0]").click()
    page.locator("[data-action=inpaint]").click()
    expect(page.locator("#editor-generate")).to_be_disabled()
    expect(page.locator("#editor-fault")).to_have_text("다시 생성할 곳을 칠하세요.")
    _drag(page, [(0.9, 0.9), (0.6, 0.9)])
    page.keyboard.press("Control+z")
    expect(page.locator("#editor-generate")).to_be_disabled()
    page.locator("#brush-size").fill("12")
    _drag(page, [(0.3, 0.5), (0.7, 0.55)])
    expect(page.locator("#editor-cells")).to_contain_text("64칸 가운데")
    page.locator("#editor-generate").click()
    wait_done(page, 2)
    after = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").first.click)[1])
    changed = (before != after).any(axis=2)
    assert changed.any()
    rows, columns = np.nonzero(changed)
    # 12 % of 32 pixels is a brush of 4: from (0.3, 0.5) to (0.7, 0.55) it stays within these
    assert rows.min() >= 13
    assert rows.max() <= 20
    assert columns.min() >= 7
    assert columns.max() <= 25


def test_cells_are_marked_by_keyboard_alone(page: Page) -> None:
    generate(page, CAPTION)
    wait_done(page)
    before = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").click)[1])
    page.locator("#generations [data-action=open-0]").press("Enter")
    page.locator("[data-action=inpaint]").press("Enter")
    page.locator("canvas.stage").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#editor .announcer")).to_have_text("2행 3열, 다시 생성")
    page.keyboard.press("Space")
    expect(page.locator("#editor .announcer")).to_have_text("2행 3열, 남김")
    page.keyboard.press("Space")
    page.keyboard.press("Control+Enter")
    wait_done(page, 2)
    after = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").first.click)[1])
    outside = np.ones((32, 32), bool)
    outside[4:8, 8:12] = False  # cells of 4 x 4 pixels: the second row, the third column
    assert (before[outside] == after[outside]).all()
    assert (before != after).any()


def test_touch_paints_too(open_in: Open, site: Site) -> None:
    with open_in(site, has_touch=True, viewport={"width": 390, "height": 800}) as (page, _):
        generate(page, CAPTION)
        wait_done(page)
        page.locator("#generations [data-action=open-0]").tap()
        page.locator("[data-action=inpaint]").tap()
        box = page.locator("canvas.stage").bounding_box()
        page.touchscreen.tap(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        expect(page.locator("#editor-generate")).to_be_enabled()


def test_variations_keep_the_rows_that_were_chosen(page: Page) -> None:
    generate(page, CAPTION)
    wait_done(page)
    before = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").click)[1])
    page.locator("#generations [data-action=open-0]").click()
    page.locator("[data-action=variations]").click()
    page.locator("#keep-rows").fill("5")
    expect(page.locator("#kept-rows")).to_have_text("8줄 가운데 위 5줄을 남깁니다.")
    page.locator("#editor-generate").click()
    wait_done(page, 2)
    after = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").first.click)[1])
    assert (before[:20] == after[:20]).all()  # 5 rows of 4 pixels
    assert (before[20:] != after[20:]).any()
    expect(page.locator(".card .facts").first).to_contain_text("위쪽을 남김")


def test_a_large_photo_is_turned_cut_and_shrunk_before_it_is_sent(page: Page, tmp_path: Path) -> None:
    photo = Image.new("RGB", (3000, 2000), (200, 30, 30))
    photo.paste((30, 30, 200), (1500, 0, 3000, 2000))  # right half; Exif says: turn by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "사진 <b>.jpg", exif=exif)
    sent = """
      const bytes = Uint8Array.from(atob(a), (letter) => letter.charCodeAt(0));
      const square = new Uint8Array(await (await m.squareOf(new File([bytes], "a.jpg", { type: "image/jpeg" }))).arrayBuffer());
      return Array.from(square);
    """
    jpeg = (tmp_path / "사진 <b>.jpg").read_bytes()
    image = Image.open(io.BytesIO(bytes(module(page, "upload", sent, base64.b64encode(jpeg).decode()))))
    assert (image.format, image.size) == ("PNG", (1024, 1024))
    square = np.asarray(image.convert("RGB"))  # (y, x, channel)
    assert square[100, 512, 0] > 150  # what was left is above now
    assert square[900, 512, 2] > 150
    page.locator("#caption").fill(CAPTION)
    page.locator("#upload-file").set_input_files(tmp_path / "사진 <b>.jpg")
    page.locator("#keep-rows").fill("4")
    page.locator("#editor-generate").click()
    wait_done(page)
    generated = pixels(downloaded(page, page.locator("#generations [data-action=download-0]").click)[1])
    assert (
        abs(generated[:12].astype(int) - (200, 30, 30)) < 8
    ).all()  # the rows kept are the photo's, JPEG's error aside


def test_files_that_are_no_images_are_refused_in_words(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    for name, text in (
        ("notes.txt", "이미지 파일이 아닙니다"),
        ("broken.png", "읽을 수 없습니다"),
        ("small.png", "너무 작습니다"),
    ):
        page.locator("#upload-file").set_input_files(tmp_path / name)
        expect(page.locator("#toast")).to_contain_text(text)
        expect(page.locator("#editor")).to_be_hidden()


def _start_from(page: Page) -> None:
    """The editor with the first image on the board, and the model's choice."""
    page.locator("#generations [data-action=open-0]").first.click()
    page.locator("[data-action=variations]").click()
    page.locator("input[name=editor-kind][value=strength]").check(force=True)


def test_strength_regenerates_the_share_that_was_chosen(page: Page) -> None:
    generate(page, CAPTION)
    wait_done(page)
    _start_from(page)
    page.locator("#strength").fill("0.25")
    expect(page.locator("#strength-tokens")).to_contain_text("64칸 가운데 16칸(25%)")
    expect(page.locator("#strength")).to_have_attribute("aria-valuetext", "25%")
    page.locator("#editor-generate").click()
    wait_done(page, 2)
    made = read_metadata(downloaded(page, page.locator("#generations [data-action=download-0]").first.click)[1])
    assert (made["init_image"]["strength"], made["init_image"]["changed_from"]) == (0.25, None)
    expect(page.locator(".card .facts").first).to_contain_text("골라서 다시 생성함")
    page.locator("#generations [data-action=open-0]").first.click()
    expect(page.locator("#viewer .facts-list")).to_contain_text("25%")


def test_a_changed_word_is_wanted_before_only_it_is_regenerated(page: Page) -> None:
    generate(page, CAPTION)
    wait_done(page)
    _start_from(page)
    page.locator("#only-changed").check()
    expect(page.locator("#strength")).to_be_disabled()
    expect(page.locator("#editor-fault")).to_have_text("설명에서 바꿀 말을 먼저 고치세요.")
    expect(page.locator("#editor-generate")).to_be_disabled()
    page.locator("#editor-caption").fill(CAPTION.replace("파랑", "노랑"))
    page.locator("#editor-generate").click()
    wait_done(page, 2)
    made = read_metadata(downloaded(page, page.locator("#generations [data-action=download-0]").first.click)[1])
    assert (made["init_image"]["strength"], made["init_image"]["changed_from"]) == (None, CAPTION)
    assert made["caption"] == CAPTION.replace("파랑", "노랑")
