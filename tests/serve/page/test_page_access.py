"""The designers' page can be used by keyboard, by screen reader, in both languages, light and dark, on any width."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser_page import CAPTION, Page, Site, generate, needs_chromium, playwright, wait_done

pytestmark = needs_chromium
expect = playwright.expect

# Roles of what a person can use, in Chromium's accessibility tree.
_ROLES = {
    *("button", "link", "textbox", "spinbutton", "checkbox", "radio", "combobox", "slider", "progressbar", "dialog"),
    *("image", "application", "DisclosureTriangle", "navigation", "region"),
}
# Each text against what is behind it: WCAG 2.2, 1.4.3 and its formula for relative luminance.
_LOW_CONTRAST = """
() => {
  const parse = (text) => {
    const [red, green, blue, alpha = 1] = text.match(/[\\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = (top, below) => top.slice(0, 3).map((value, index) => value * top[3] + below[index] * (1 - top[3]));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(parse(getComputedStyle(at).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((value) => value / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const isTyped = ["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName) && !["radio", "checkbox", "range"].includes(element.type);
    if ((!hasText && !isTyped) || !element.checkVisibility({ opacityProperty: true }) || element.closest(":disabled, .visually-hidden")) continue;
    const ground = behind(element);
    const pairs = [["", getComputedStyle(element)]];
    if (element.placeholder) pairs.push(["::placeholder", getComputedStyle(element, "::placeholder")]);
    for (const [part, style] of pairs) {
      const colour = parse(style.color);
      colour[3] *= Number(style.opacity);
      const [low, high] = [luminance(over(colour, ground)), luminance(ground)].sort((one, other) => one - other);
      const ratio = (high + 0.05) / (low + 0.05);
      if (ratio < 4.5) faint.push(`${element.tagName}.${element.className}${part} ${ratio.toFixed(2)} ${element.textContent.slice(0, 20)}`);
    }
  }
  return faint;
}
"""


@pytest.fixture
def page(form_page: Page) -> Page:
    """With the form for attributes: the most that the page shows."""
    return form_page


@pytest.fixture
def finished(page: Page) -> Page:
    """With a finished generation of two images and two more candidates, all folds open."""
    page.evaluate("() => document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    generate(page, CAPTION)
    wait_done(page)
    page.locator("[data-action=candidates]").click()
    return page


def _nameless(page: Page) -> list[str]:
    """Roles of controls and images without an accessible name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    shown = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in _ROLES]
    assert len(shown) > 2, "the tree was not read"
    return [node["role"]["value"] for node in shown if not node.get("name", {}).get("value", "").strip()]


def _states(page: Page) -> Iterator[str]:
    """Brings the page into one state after another, from a finished generation on."""
    yield "board"
    page.locator("#generations [data-action=open-0]").click()
    yield "viewer"
    page.locator("#viewer [data-action=remove]").click()
    yield "question"
    page.keyboard.press("Escape")
    page.locator("[data-action=inpaint]").click()
    yield "inpaint"
    page.locator("input[name=editor-kind][value=rows]").check(force=True)
    yield "rows"
    page.locator("input[name=editor-kind][value=strength]").check(force=True)
    yield "strength"
    page.keyboard.press("Escape")
    page.locator("#caption").fill("네모 " * 120)
    page.locator("#generate").click()
    page.locator("#seed").fill("x")
    yield "faults"
    page.locator("#to-gallery").click()
    page.locator("#gallery-grid li").first.wait_for()
    for box in (0, 1):
        page.locator("#gallery-grid [data-action=select]").nth(box).check()
    yield "gallery"
    page.locator("#selection [data-action=collect]").click()
    page.locator("#collection-new").fill("봄")
    page.locator("#question button[type=submit]").click()
    page.locator("#gallery-collection-field").wait_for()
    page.locator("#selection [data-action=compare]").click()
    yield "compare"
    page.locator("input[name=compare-view][value=over]").check(force=True)
    yield "overlaid"
    page.keyboard.press("Escape")
    page.locator("#to-studio").click()
    page.locator("#seed").fill("")
    page.locator("#several-kind-list").check(force=True)
    page.locator("#several-lines").fill(CAPTION)
    yield "list"
    page.locator("#several-make").click()
    page.locator(".sheet .cell.done").wait_for()
    yield "sheet"


@pytest.mark.parametrize("language", ["ko", "en"])
def test_every_control_has_a_name(finished: Page, language: str) -> None:
    if language == "en":
        finished.locator("#language-button").click()
    for state in _states(finished):
        assert not _nameless(finished), state


def test_the_check_of_names_finds_a_button_without_one(page: Page) -> None:
    page.evaluate("() => document.querySelector('#theme-button').removeAttribute('aria-label')")
    page.evaluate("() => document.querySelector('#theme-button').removeAttribute('title')")
    assert _nameless(page) == ["button"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(finished: Page, scheme: str) -> None:
    finished.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for state in _states(finished):
        assert not finished.evaluate(_LOW_CONTRAST), state


def test_a_chosen_theme_overrides_the_system_and_stays(page: Page, form_site: Site) -> None:
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator("#theme-button").click()  # light
    page.locator("#theme-button").click()  # dark
    dark = page.evaluate(ground)
    assert dark != light
    assert not page.evaluate(_LOW_CONTRAST)
    page.goto(form_site.address)
    assert page.evaluate(ground) == dark


def test_the_check_of_contrast_finds_grey_on_white(page: Page) -> None:
    page.evaluate("() => document.querySelector('#compose-title').style.setProperty('color', '#999')")
    assert len(page.evaluate(_LOW_CONTRAST)) == 1


def _tab_stops(page: Page, root: str, *, most: int = 120) -> list[dict[str, Any]]:
    """Presses Tab until the focus has left `root` or come back to where it began."""
    look = """
      (root) => {
        const at = document.activeElement;
        const all = [...document.querySelectorAll("*")];
        const ring = [at, at.closest("label"), at.nextElementSibling].filter(Boolean);
        return {
          place: all.indexOf(at), name: at.id || at.dataset.action || at.name || at.tagName,
          isInside: Boolean(at.closest(root)),
          hasRing: ring.some((each) => getComputedStyle(each).outlineStyle !== "none"),
        };
      }"""
    stops: list[dict[str, Any]] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        stop = page.evaluate(look, root)
        if stop["name"] == "BODY" or (stops and stop["place"] == stops[0]["place"]):
            return stops
        stops.append(stop)
    raise AssertionError(f"no end after {most} stops")


def test_tab_goes_through_everything_in_reading_order_with_a_ring(finished: Page) -> None:
    finished.evaluate("() => document.activeElement.blur()")
    finished.evaluate(
        "() => { document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex'); }"
    )
    stops = _tab_stops(finished, "body")
    names = [stop["name"] for stop in stops]
    assert [stop["place"] for stop in stops] == sorted(stop["place"] for stop in stops)
    assert all(stop["hasRing"] for stop in stops), [stop["name"] for stop in stops if not stop["hasRing"]]
    assert names[0] == "A"  # the way past the header
    for needed in (
        "to-gallery",
        "language-button",
        "caption",
        "subject",
        "n",
        "candidates",
        "seed",
        "temperature",
        "generate",
        "open-0",
        "star-0",
        "another",
    ):
        assert needed in names, names
    assert names.count("subject") == 1  # a group of choices is one stop; arrows go on inside


def test_a_dialog_holds_the_focus_and_gives_it_back(finished: Page) -> None:
    finished.locator("#generations [data-action=open-1]").focus()
    finished.keyboard.press("Enter")
    expect(finished.locator("#viewer")).to_be_visible()
    stops = _tab_stops(finished, "#viewer")
    assert len(stops) >= 8
    # Chromium's own toolbar is the one place outside that Tab reaches; in the page, none
    assert all(stop["isInside"] for stop in stops)
    finished.keyboard.press("Escape")
    expect(finished.locator("#viewer")).to_be_hidden()
    expect(finished.locator("#generations [data-action=open-1]")).to_be_focused()


def test_arrows_go_through_the_images_of_a_generation(finished: Page) -> None:
    finished.locator("#generations [data-action=open-0]").click()
    expect(finished.locator("#viewer-title")).to_have_text("1위")
    finished.keyboard.press("ArrowRight")
    expect(finished.locator("#viewer-title")).to_have_text("2위")
    finished.keyboard.press("ArrowLeft")
    expect(finished.locator("#viewer-title")).to_have_text("1위")


def test_progress_is_announced_in_few_words(page: Page) -> None:
    page.evaluate(
        """() => {
          window.announced = [];
          const place = document.querySelector("body > .announcer");
          new MutationObserver(() => window.announced.push(place.textContent)).observe(place, { childList: true });
        }"""
    )
    assert page.locator("body > .announcer").get_attribute("role") == "status"  # polite
    generate(page, CAPTION, n=2, candidates=8)
    wait_done(page)
    announced = page.evaluate("() => window.announced")
    assert announced[-1] == "이미지 2장이 완성되었습니다."
    assert len(announced) <= 3, announced


def test_landmarks_and_headings_lead_through_the_page(finished: Page) -> None:
    for role, name in (("navigation", "화면"), ("form", "어떤 이미지를 만들까요?"), ("region", "이미지")):
        expect(finished.get_by_role(role, name=name, exact=True)).to_have_count(1)
    for role in ("banner", "main", "contentinfo"):
        expect(finished.get_by_role(role)).to_have_count(1)
    levels = finished.locator("h1:visible, h2:visible, h3:visible, h4:visible").evaluate_all(
        "all => all.map((each) => Number(each.tagName[1]))"
    )
    assert levels == [1, 2, 3, 4]


def test_nothing_sticks_out_sideways_and_everything_is_large_enough_to_hit(finished: Page) -> None:
    controls = finished.locator("button, a, select, .chip, .swatch-choice")
    small = (
        "all => all.filter((each) => each.checkVisibility() && Math.min(each.offsetWidth, each.offsetHeight) < 24)"
        ".map((each) => each.outerHTML)"
    )
    for language in ("ko", "en"):
        assert finished.evaluate("() => document.documentElement.lang") == language
        for width in (320, 360, 768, 1024, 1600):
            finished.set_viewport_size({"width": width, "height": 800})
            assert finished.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0, width
            assert not controls.evaluate_all(small), width  # WCAG 2.2, 2.5.8
        finished.locator("#language-button").click()


def test_reduced_motion_is_respected(finished: Page) -> None:
    moving = "() => [...document.querySelectorAll('*')].filter((each) => parseFloat(getComputedStyle(each).transitionDuration) > 0).length"
    assert finished.evaluate(moving) > 0
    finished.emulate_media(reduced_motion="reduce")
    assert finished.evaluate(moving) == 0
