"""Nothing that has the keyboard, and no message, lies behind a bar that stays in view: at every size, and zoomed."""

from typing import Any

import pytest

from tests.browser_page import Open, Page, Site, needs_chromium, playwright

expect = playwright.expect
pytestmark = needs_chromium

# Desktop, small laptop, phone, phone on its side, and a desktop of 1280 x 900 zoomed to 400 %.
SIZES = [(1280, 900), (1024, 600), (390, 844), (844, 390), (320, 225)]

# Which bar, or what else, lies over the middle of an element's visible part; null: nothing does.
COVERED = """(element) => {
  const box = element.getBoundingClientRect();
  const [top, bottom] = [Math.max(box.top, 0), Math.min(box.bottom, innerHeight)];
  if (bottom <= top) return "outside of the window";
  for (const share of [0.15, 0.5, 0.85]) {
    const at = document.elementFromPoint(box.left + box.width / 2, top + (bottom - top) * share);
    const bar = at && !element.contains(at) && at.closest(".bars, .submit, .selection");
    if (bar && !bar.contains(element)) return bar.className;
  }
  return null;
}"""


def _covered(page: Page, selector: str) -> Any:
    return page.locator(selector).evaluate(COVERED)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("language", ["ko", "en"])
def test_tab_never_goes_behind_a_bar(open_in: Open, form_site: Site, size: tuple[int, int], language: str) -> None:
    width, height = size
    with open_in(form_site, viewport={"width": width, "height": height}, reduced_motion="reduce") as (page, _):
        if language == "en":
            page.locator("#language-button").click()
        page.locator("#builder").evaluate("fold => (fold.open = true)")
        page.locator("#advanced").evaluate("fold => (fold.open = true)")
        for keys in ("Tab", "Shift+Tab"):
            for _ in range(70):
                page.keyboard.press(keys)
                found = page.evaluate(
                    f"() => document.activeElement === document.body ? null : ({COVERED})(document.activeElement)"
                )
                assert found is None, (page.evaluate("() => document.activeElement.outerHTML.slice(0, 200)"), found)


@pytest.mark.parametrize("size", SIZES)
def test_a_selection_hides_nothing_that_has_the_keyboard(open_in: Open, site: Site, size: tuple[int, int]) -> None:
    width, height = size
    with open_in(site, viewport={"width": width, "height": height}, reduced_motion="reduce") as (page, _):
        page.evaluate(
            """() => import('/page/store.js').then(async (m) => {
              const blob = await new Promise((resolve) => document.createElement("canvas").toBlob(resolve));
              const image = { rank: 1, candidate: 0, score: null, blob, isShown: true, isFavourite: false };
              const request = { kind: "new", caption: "상의에서 색상은 화이트이다.", seed: "1", candidates: 1, n: 1 };
              const store = await m.openStore();
              for (let number = 0; number < 12; number++)
                await store.put({ id: m.newId(), createdMs: Date.now(), request, images: [image], totalS: 1 });
              window.location.hash = "#gallery";
            })"""
        )
        page.locator("#gallery-grid li").nth(11).wait_for()
        page.locator("#gallery-grid [data-action=select]").first.focus()
        page.keyboard.press("Control+a")
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
        for keys in ("ArrowDown", "ArrowDown", "Tab", "Tab", "Tab", "Tab", "Shift+Tab", "ArrowUp", *["Tab"] * 60):
            page.keyboard.press(keys)
            at = "document.activeElement"
            found = page.evaluate(f"() => {at} === document.body ? null : ({COVERED})({at})")
            assert found is None, (page.evaluate(f"() => {at}.outerHTML.slice(0, 200)"), found)


@pytest.mark.parametrize("size", SIZES)
def test_a_bad_seed_shows_its_field_and_its_message(open_in: Open, site: Site, size: tuple[int, int]) -> None:
    width, height = size
    with open_in(site, viewport={"width": width, "height": height}, reduced_motion="reduce") as (page, _):
        page.locator("#caption").fill("빨강")
        page.locator("#seed").fill("abc")
        expect(page.locator("#caption-tokens")).not_to_be_empty()  # what it shows of the caption moves what is beneath
        page.locator("#generate").click()
        expect(page.locator("#seed")).to_be_focused()
        assert _covered(page, "#seed") is None
        if height > 300:
            assert _covered(page, "#settings-fault") is None
        field, message = (page.locator(name).bounding_box() for name in ("#seed", "#settings-fault"))
        assert 0 <= message["y"] - (field["y"] + field["height"]) < 30  # beneath it


@pytest.mark.parametrize("size", SIZES)
def test_bars_leave_most_of_the_window(open_in: Open, form_site: Site, size: tuple[int, int]) -> None:
    """At 400 % they once left 30 pixels between them."""
    width, height = size
    with open_in(form_site, viewport={"width": width, "height": height}) as (page, _):
        page.evaluate("() => window.scrollTo(0, 250)")
        taken = page.evaluate(
            """() => [".bars", ".submit"].map((name) => document.querySelector(name))
              .filter((bar) => getComputedStyle(bar).position === "sticky")
              .reduce((sum, bar) => sum + bar.offsetHeight, 0)"""
        )
        assert taken <= height / 2.5


def test_the_notice_of_a_lost_connection_covers_no_button(open_in: Open, site: Site) -> None:
    with open_in(site) as (page, _):
        page.evaluate(
            """() => {
              const notice = document.getElementById("notice");
              notice.hidden = false;
              notice.textContent = "서버와 연결이 끊겼거나 서버가 다시 시작하는 중입니다.";
            }"""
        )
        for top in (0, 400):
            page.evaluate("(top) => window.scrollTo(0, top)", top)
            page.wait_for_function(
                "() => parseInt(getComputedStyle(document.documentElement).getPropertyValue('--bars')) > 60"
            )
            box = page.locator("#generate").bounding_box()
            assert box["y"] + box["height"] <= 900
            assert _covered(page, "#generate") is None


@pytest.mark.parametrize("width", [320, 360, 390, 420, 900, 1280])
def test_no_name_of_a_subject_is_broken(open_in: Open, form_site: Site, width: int) -> None:
    with open_in(form_site, viewport={"width": width, "height": 900}) as (page, _):
        page.locator("#language-button").click()
        page.locator("#builder").evaluate("fold => (fold.open = true)")
        lines = page.locator(".segment span:first-of-type").evaluate_all(
            """names => names.filter((name) => name.textContent).map((name) => {
              const range = document.createRange();
              range.selectNodeContents(name);
              return [name.textContent, new Set([...range.getClientRects()].map((box) => box.top)).size];
            })"""
        )
        assert lines
        assert all(count == 1 for name, count in lines if " " not in name), lines
        overflow = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0
