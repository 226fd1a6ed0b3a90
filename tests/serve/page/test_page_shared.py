"""Caption and settings come back from a link, a settings file and an image: checked as if they had been typed."""

import base64
import io
import json
from typing import Any
from urllib.parse import quote, urlencode

from PIL import Image

from engine.pipeline.image_encoding import encode_image
from tests.browser_page import (
    CAPTION,
    Open,
    Page,
    Site,
    downloaded,
    fill,
    generate,
    module,
    needs_chromium,
    open_page,
    playwright,
    wait_done,
)

expect = playwright.expect
pytestmark = needs_chromium

FIELDS = ("caption", "n", "candidates", "seed", "temperature", "guidance", "top_k", "top_p")


def _values(page: Page) -> dict[str, str]:
    return {name: page.locator(f"#{name}").input_value() for name in FIELDS}


def _drop(page: Page, name: str, content: bytes, media_type: str) -> None:
    """Drops a file on the page."""
    page.evaluate(
        """([name, content, type]) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], name, { type }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [name, base64.b64encode(content).decode(), media_type],
    )


def test_a_copied_link_fills_the_form_elsewhere_and_generates_nothing(open_in: Open, site: Site) -> None:
    with open_in(site) as (page, _):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("#advanced").evaluate("fold => fold.open = true")
        page.locator("#top_k").fill("9")
        page.locator("#temperature").fill("0.8")
        generate(page, f"{CAPTION} & 50% #1", n=1, candidates=2, seed=str(2**64 - 1))
        wait_done(page)
        before = _values(page)
        image = downloaded(page, page.locator("#generations [data-action=download-0]").click)
        page.locator("#generations [data-action=link]").click()
        expect(page.locator("#toast")).to_contain_text("링크를 복사했습니다")
        link = page.evaluate("() => navigator.clipboard.readText()")
        page.locator("#generations [data-action=open-0]").click()
        page.locator("#viewer [data-action=link]").click()
        expect(page.locator("#toast")).to_contain_text("링크를 복사했습니다")
        assert page.evaluate("() => navigator.clipboard.readText()") == link
    with open_in(site, start=False) as (other, _):
        other.goto(link)
        expect(other.locator("#toast")).to_have_text("링크의 설명과 설정을 넣었습니다.")
        assert _values(other) == before
        expect(other.locator(".card")).to_have_count(0)
        assert other.url.endswith("#studio")
        other.locator("#generate").click()
        wait_done(other)
        assert downloaded(other, other.locator("#generations [data-action=download-0]").click) == image
        other.locator("#caption").fill("초록")
        open_page(other, f"{site.address}/#studio")
        expect(other.locator("#caption")).to_have_value("초록")  # a reload brings back what was written last


def test_a_link_in_an_open_page_sets_what_it_leaves_out_to_the_defaults(page: Page) -> None:
    fill(page, "초록", n=3, candidates=9, seed="4")
    page.evaluate("hash => { window.location.hash = hash; }", f"prompt={quote('빨강')}&candidates=5")
    expect(page.locator("#caption")).to_have_value("빨강")
    found = _values(page)
    assert (found["candidates"], found["n"], found["seed"], found["temperature"]) == ("5", "4", "", "1")
    page.evaluate("() => { window.location.hash = 'gallery'; }")
    expect(page.locator("#gallery")).to_be_visible()


_HOSTILE = [
    ("seed", str(2**64), "시드는 0부터"),
    ("seed", "-1", "시드는 0부터"),
    ("n", "99", "보여 줄 이미지"),
    ("candidates", "2.5", "후보"),
    ("temperature", "1e999", "온도"),
    ("temperature", "0x10", "온도"),
    ("guidance", "NaN", "설명 반영도"),
    ("top_k", "<img src=x onerror=alert(1)>", "top-k"),
    ("top_p", "0", "top-p"),
]


def test_a_hostile_value_is_refused_as_in_the_form(page: Page) -> None:
    right = _values(page)
    for number, (name, value, message) in enumerate(_HOSTILE):
        link = urlencode({"prompt": f"빨강 {number}", name: value})
        page.evaluate("hash => { window.location.hash = hash; }", link)
        expect(page.locator("#caption")).to_have_value(f"빨강 {number}")
        expect(page.locator("#settings-fault")).to_contain_text(message)
        expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
        assert _values(page) == right | {"caption": f"빨강 {number}"}
    expect(page.locator(".card")).to_have_count(0)
    assert page.locator("img[src=x]").count() == 0


def test_a_hostile_caption_is_text_and_too_long_a_one_is_refused(page: Page) -> None:
    page.evaluate("hash => { window.location.hash = hash; }", urlencode({"prompt": "<b>굵게</b>" + "가" * 300}))
    expect(page.locator("#caption-fault")).to_contain_text("자가 넘쳤습니다")
    assert page.locator("#compose b").count() == 0
    page.locator("#generate").click()
    expect(page.locator(".card")).to_have_count(0)


def test_a_dropped_image_of_this_page_brings_back_what_made_it(page: Page, site: Site) -> None:
    answer = site.post(
        "/v1/images/generations",
        {"prompt": CAPTION, "n": 3, "candidates": 3, "seed": 2**63 + 1, "temperature": 0.9, "top_k": 7, "guidance": 2},
    )
    image = max(answer["data"], key=lambda each: each["candidate"])
    content = base64.b64decode(image["b64_json"])
    fill(page, "초록", n=1, candidates=1)
    _drop(page, "옷.png", content, "image/png")
    expect(page.locator("#toast")).to_have_text("설명과 설정을 넣었습니다: 옷.png.")
    expect(page.locator("#editor")).to_be_hidden()
    found = _values(page)
    assert found == {
        **{"caption": CAPTION, "n": "1", "candidates": "3", "seed": str(2**63 + 1)},
        **{"temperature": "0.9", "guidance": "2", "top_k": "7", "top_p": ""},
    }
    page.locator("#n").fill("3")
    page.locator("#generate").click()
    wait_done(page)
    presses = [page.locator(f"#generations [data-action=download-{index}]").click for index in range(3)]
    assert content in [downloaded(page, press)[1] for press in presses]


def test_dropped_settings_and_sheets_fill_the_form_and_others_are_refused_in_one_line(page: Page) -> None:
    copied = f'{{"prompt": "빨강 \\"seed\\": 5", "n": 2, "candidates": 6, "seed": {2**64 - 1}, "model": "x"}}'
    _drop(page, "settings.json", copied.encode(), "application/json")
    expect(page.locator("#caption")).to_have_value('빨강 "seed": 5')
    assert (_values(page)["seed"], _values(page)["candidates"]) == (str(2**64 - 1), "6")
    made = {
        "caption": "상의 셔츠",
        "seed": 8,
        "candidate": 0,
        "sampling_params": {"temperature": 0.5},
        "model_digest": "f",
    }
    plain = io.BytesIO()
    Image.new("RGB", (40, 40)).save(plain, format="PNG")
    sheet = module(
        page,
        "png_text",
        "return Array.from(m.withTexts(Uint8Array.from(a[0]), new Map([['sheet', a[1]]])));",
        [
            list(plain.getvalue()),
            json.dumps({"caption": "셔츠", "axes": [], "images": [{"cell": 0, "provenance": made}]}),
        ],
    )
    _drop(page, "표.png", bytes(sheet), "image/png")
    expect(page.locator("#toast")).to_contain_text("다른 모델의 이미지라")
    assert (_values(page)["caption"], _values(page)["seed"], _values(page)["temperature"]) == ("셔츠", "8", "0.5")
    before = _values(page)
    foreign: list[tuple[str, bytes, str]] = [
        ("notes.txt", b"caption: red", "text/plain"),
        ("list.json", b"[1, 2]", "application/json"),
        ("broken.json", b'{"prompt": ', "application/json"),
        ("number.json", b'{"prompt": 5}', "application/json"),
        ("huge.json", b'{"prompt": "x", "more": "' + b"y" * 2**20 + b'"}', "application/json"),
    ]
    for name, content, media_type in foreign:
        _drop(page, name, content, media_type)
        expect(page.locator("#toast")).to_contain_text(f"{name}: 설명과 설정이 든 파일이 아닙니다")
    assert _values(page) == before
    hostile: dict[str, Any] = made | {"caption": {"a": 1}}
    with_foreign_text = encode_image(Image.new("RGB", (40, 40)), "png", metadata=hostile)
    for content in (plain.getvalue(), with_foreign_text):  # images without settings are started from, as before
        _drop(page, "사진.png", content, "image/png")
        expect(page.locator("#editor")).to_be_visible()
        page.keyboard.press("Escape")
    expect(page.locator(".card")).to_have_count(0)
