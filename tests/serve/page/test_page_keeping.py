"""What was generated is found again, chosen, collected, compared and exported in the designers' page."""

import csv
import io
import json
import re
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest

from engine.pipeline.image_encoding import read_metadata
from tests.browser_page import (
    CAPTION,
    Page,
    Site,
    downloaded,
    generate,
    needs_chromium,
    open_page,
    pixels,
    playwright,
    wait_done,
)

pytestmark = needs_chromium
expect = playwright.expect

OTHER = "초록 바탕에 노랑 동그라미"


@pytest.fixture
def gallery(page: Page) -> Page:
    """The gallery with three images of one caption and, newer, one of another."""
    generate(page, CAPTION, n=3, candidates=3, seed="11")
    wait_done(page)
    generate(page, OTHER, n=1, candidates=2, seed="12")
    wait_done(page, 2)
    page.locator("#to-gallery").click()
    expect(page.locator("#gallery-grid li")).to_have_count(4)
    return page


def _boxes(page: Page) -> Any:
    return page.locator("#gallery-grid [data-action=select]")


def _press(page: Page, action: str) -> None:
    page.locator(f"#selection [data-action={action}]").click()


# --------------------------------------------------------------------------------------------- search, days, choosing


def test_search_finds_captions_by_their_words_and_days_are_headings(gallery: Page) -> None:
    gallery.evaluate(
        """() => import('/page/store.js').then(async (m) => {
          const store = await m.openStore();
          const [newest] = await store.newest(null, 1, () => true);
          const createdMs = new Date(2024, 1, 29, 15, 4).getTime();
          await store.put({ ...newest, id: `${String(createdMs).padStart(14, "0")}-0`, createdMs });
        })"""
    )
    gallery.reload()
    expect(gallery.locator(".day h2")).to_have_text(["오늘", "2024년 2월 29일 목요일"])
    tiles = gallery.locator("#gallery-grid li")
    expect(tiles).to_have_count(5)
    for words, count in (("동그라미 초록", 2), ("바탕에 ", 5), ("없는말", 0)):
        gallery.locator("#gallery-search").fill(words)
        expect(tiles).to_have_count(count)
    expect(gallery.locator("#gallery-empty-title")).to_have_text("찾는 이미지가 없습니다")
    gallery.locator("#gallery-search").fill("")
    expect(tiles).to_have_count(5)


def test_images_are_chosen_by_keyboard_and_deleted_after_one_question(gallery: Page) -> None:
    boxes, count = _boxes(gallery), gallery.locator("#selection-count")
    boxes.nth(0).focus()
    gallery.keyboard.press("Space")
    expect(count).to_have_text("1장 골랐습니다")
    gallery.keyboard.press("ArrowRight")
    gallery.keyboard.press("ArrowRight")
    gallery.keyboard.press("Shift+Space")
    expect(count).to_have_text("3장 골랐습니다")
    gallery.keyboard.press("Shift+ArrowRight")
    expect(count).to_have_text("4장 골랐습니다")
    gallery.keyboard.press("Escape")
    expect(gallery.locator("#selection")).to_be_hidden()
    expect(boxes.nth(0)).to_be_focused()
    gallery.keyboard.press("Control+a")
    expect(count).to_have_text("4장 골랐습니다")
    gallery.keyboard.press("Space")  # the first stays
    gallery.locator("#gallery-search").fill("빨강")
    expect(count).to_have_text("3장 골랐습니다")
    gallery.locator("#gallery-search").fill("초록")
    expect(count).to_have_text("3장 골랐습니다 · 3장은 지금 보이지 않습니다")
    gallery.locator("#gallery-search").fill("")
    expect(boxes).to_have_count(4)
    boxes.nth(1).focus()
    gallery.keyboard.press("Enter")
    expect(gallery.locator("#selection [data-action=compare]")).to_be_focused()
    _press(gallery, "remove-chosen")
    expect(gallery.locator("#question h2")).to_have_text("이미지 3장을 지울까요?")
    gallery.locator("#question button[type=submit]").click()
    expect(gallery.locator("#gallery-grid li")).to_have_count(1)
    expect(gallery.locator("#selection")).to_be_hidden()
    gallery.reload()
    expect(gallery.locator(".tile-caption")).to_have_text([OTHER])


# -------------------------------------------------------------------------------------------------------- collections


def test_an_image_is_in_several_collections_and_windows_agree(gallery: Page, site: Site) -> None:
    def collect(indices: list[int], *, known: list[str], new: str = "") -> None:
        for index in indices:
            _boxes(gallery).nth(index).check()
        _press(gallery, "collect")
        for name in known:
            gallery.locator("#question").get_by_label(name, exact=True).check()
        gallery.locator("#collection-new").fill(new)
        gallery.locator("#question button[type=submit]").click()
        expect(gallery.locator("#question")).to_be_hidden()
        _press(gallery, "let-go")

    collect([0, 1], known=[], new="봄 기획")
    collect([1, 2], known=["봄 기획"], new="보고용")
    other = gallery.context.new_page()
    open_page(other, f"{site.address}/#gallery")
    choice, tiles = other.locator("#gallery-collection"), other.locator("#gallery-grid li")
    for name, count in (("봄 기획", 3), ("보고용", 2)):
        choice.select_option(label=name)
        expect(tiles).to_have_count(count)
    gallery.locator("#gallery-collection").select_option(label="보고용")
    gallery.locator("[data-action=rename-collection]").click()
    gallery.locator("#collection-name").fill("봄 기획")
    expect(gallery.locator("#question .fault")).to_have_text("같은 이름의 모음이 있습니다.")
    gallery.locator("#collection-name").fill("회의")
    gallery.locator("#question button[type=submit]").click()
    expect(choice.locator("option")).to_have_text(["모든 이미지", "봄 기획", "회의"])
    gallery.locator("[data-action=remove-collection]").click()
    gallery.locator("#question button[type=submit]").click()
    expect(choice.locator("option")).to_have_text(["모든 이미지", "봄 기획"])
    expect(tiles).to_have_count(4)  # the images stay


def test_a_full_disk_refuses_a_change_in_one_line(gallery: Page) -> None:
    # Chromium lets changes of a few bytes through whatever its quota is.
    gallery.evaluate(
        """() => {
          const put = IDBObjectStore.prototype.put;
          IDBObjectStore.prototype.put = function (...values) {
            const request = put.apply(this, values);
            this.transaction.abort();
            return request;
          };
          const full = new DOMException("full", "QuotaExceededError");
          Object.defineProperty(IDBTransaction.prototype, "error", { get: () => full });
        }"""
    )
    gallery.locator("#gallery-grid [data-action^=star]").first.click()
    expect(gallery.locator("#gallery-fault")).to_contain_text("저장 공간이 가득 차")
    expect(gallery.locator("#gallery-grid [data-action^=star]").first).to_have_attribute("aria-pressed", "false")


# ------------------------------------------------------------------------------------------------------------ compare


def test_two_images_are_compared_by_a_slider_and_differences_are_named(gallery: Page) -> None:
    compare = gallery.locator("#compare")
    _boxes(gallery).nth(0).check()
    expect(gallery.locator("#selection [data-action=compare]")).to_be_disabled()
    _boxes(gallery).nth(1).check()
    _press(gallery, "compare")
    expect(compare.locator("figure")).to_have_count(2)
    expect(compare.locator("tbody th")).to_contain_text(["설명", "시드"])
    expect(compare.locator("mark")).to_contain_text(["초록", "노랑", "동그라미", "빨강", "파랑", "네모"])
    expect(compare.locator(".differences .hint")).to_contain_text("온도: 1")
    gallery.keyboard.press("ArrowRight")  # of the choice of the view
    slider = compare.get_by_role("slider", name="경계")
    expect(slider).to_have_attribute("aria-valuetext", "1위 · 시드 12 50%, 1위 · 시드 11 50%")
    slider.focus()
    for _ in range(10):
        gallery.keyboard.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "1위 · 시드 12 40%, 1위 · 시드 11 60%")
    assert compare.locator(".upper").evaluate("upper => getComputedStyle(upper).clipPath") == "inset(0px 60% 0px 0px)"
    gallery.keyboard.press("Escape")
    _boxes(gallery).nth(2).check()
    _press(gallery, "compare")
    gallery.locator("input[name=compare-view][value=over]").check(force=True)
    compare.get_by_role("combobox", name="오른쪽 이미지").select_option(index=2)
    expect(compare.locator(".stack > img")).to_have_attribute("alt", "C: 2위 · 시드 11")


def test_an_edit_stands_beside_its_source(page: Page) -> None:
    generate(page, CAPTION, n=1, candidates=1)
    wait_done(page)
    page.locator("#generations [data-action=open-0]").click()
    page.locator("[data-action=variations]").click()
    page.locator("#editor-generate").click()
    wait_done(page, 2)
    source = page.locator(".card.done").first.locator(".source")
    expect(source).to_contain_text("원본")
    source.get_by_role("button", name="원본과 비교").click()
    expect(page.locator("#compare .compare-note")).to_have_text("위쪽을 남김")
    expect(page.locator("#compare img")).to_have_count(2)


# ------------------------------------------------------------------------------------------------- files and their marks


def test_a_zip_has_the_files_of_single_downloads_and_a_table(gallery: Page) -> None:
    single = downloaded(gallery, gallery.locator("#gallery-grid [data-action=download-0]").first.click)[1]
    gallery.locator("#select-shown").click()
    name, content = downloaded(gallery, lambda: _press(gallery, "zip"))
    assert re.fullmatch(r"kodalle-\d{8}\.zip", name)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        files = {each: archive.read(each) for each in archive.namelist()}
    assert len(files) == 5
    assert single in files.values()
    rows = list(csv.DictReader(io.StringIO(files["images.csv"].decode("utf-8-sig"))))
    for row in rows:
        made = read_metadata(files[row["file"]])
        assert [row["caption"], row["seed"], row["candidate"]] == [
            made["caption"],
            str(made["seed"]),
            str(made["candidate"]),
        ]


def test_a_pdf_has_the_pixels_the_captions_and_the_marks(gallery: Page) -> None:
    single = downloaded(gallery, gallery.locator("#gallery-grid [data-action=download-0]").first.click)[1]
    gallery.locator("#select-shown").click()
    content = downloaded(gallery, lambda: _press(gallery, "pdf"))[1]
    objects = _objects(content)
    images = [pixels_of for head, pixels_of in objects if b"/DeviceRGB" in head]
    assert [len(each) for each in images] == [32 * 32 * 3] * 4
    assert images[0] == pixels(single).tobytes()
    marks = [stream for head, stream in objects if b"/Subtype /XML" in head]
    assert len(marks) == 5  # of each image and of the document
    assert all(b"digitalsourcetype/trainedAlgorithmicMedia" in each for each in marks)
    attached = json.loads(next(stream for head, stream in objects if b"/EmbeddedFile" in head))
    assert attached[0] == read_metadata(single)
    lines = _text(objects)
    assert CAPTION in lines
    assert "AI로 만든 이미지입니다." in lines
    assert "1 / 1" in lines
    ground = next(np.frombuffer(stream, np.uint8) for head, stream in objects if b"/DeviceGray" in head)
    assert (ground < 128).mean() > 0.001  # the text is painted


def _objects(pdf: bytes) -> list[tuple[bytes, bytes]]:
    """Dictionary and stream of each object, found by the table at the file's end."""
    table = pdf[int(pdf[pdf.rindex(b"startxref") + 9 :].split()[0]) :]
    assert table.startswith(b"xref")
    found = []
    for number, offset in enumerate(re.findall(rb"(\d{10}) 00000 n ", table), start=1):
        start = pdf[int(offset) :]
        assert start.startswith(b"%d 0 obj\n" % number)
        head, _, rest = start.partition(b">>\nstream\n" if b">>\nstream\n" in start.split(b"endobj")[0] else b"endobj")
        length = re.search(rb"/Length (\d+)", head)
        stream = rest[: int(length[1])] if length else b""
        found.append((head, zlib.decompress(stream) if b"/FlateDecode" in head else stream))
    return found


def _text(objects: list[tuple[bytes, bytes]]) -> list[str]:
    """Lines of text as a reader of PDF finds them, by the fonts' tables."""
    tables = [stream for _, stream in objects if b"beginbfchar" in stream]
    letters = [
        {
            int(code, 16): bytes.fromhex(text.decode()).decode("utf-16-be")
            for code, text in re.findall(rb"<(..)> <(\w{4,})>", one)
        }
        for one in tables
    ]
    page = next(stream for _, stream in objects if b"BT 3 Tr" in stream)
    return [
        "".join(letters[int(font)][int(code, 16)] for font, code in re.findall(rb"/F(\d+) \S+ Tf <(..)> Tj", line))
        for line in re.findall(rb"BT(.*?)ET", page, re.S)
    ]


def test_a_download_in_a_chosen_size_is_the_servers_and_says_so(page: Page, site: Site) -> None:
    generate(page, CAPTION, n=1, candidates=3, seed="9")
    wait_done(page)
    own = downloaded(page, page.locator("#generations [data-action=download-0]").click)[1]
    page.locator("#generations [data-action=open-0]").click()
    size = page.locator("#viewer-size")
    expect(size.locator("option")).to_have_text(
        ["32픽셀 (생성한 그대로)", "64픽셀 (키움)", "96픽셀 (키움)", "128픽셀 (키움)", "1,024픽셀 (키움)"]
    )
    size.select_option("64")
    expect(page.locator("#viewer-size-hint")).to_contain_text("세밀한 부분이 새로 생기지는 않고")
    name, content = downloaded(page, page.locator("#viewer [data-action=download]").click)
    made, before = read_metadata(content), read_metadata(own)
    assert name.endswith(f"-{made['candidate']}-64.png")
    assert made["rendition"] == {"size": 64, "enlarged_from": 32, "background": "opaque", "visible_mark": ""}
    assert made | {"rendition": None} == before
    small = pixels(content).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small - pixels(own)).mean() < 4  # the same image
