"""The designers' page can be used by keyboard, by screen reader, in both languages, light and dark, on any width."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser_page import Page, Site, chromium, draw, model_site, needs_chromium, opened, playwright, wait_done

pytestmark = needs_chromium
expect = playwright.expect

CAPTION = "빨강 바탕에 파랑 네모"
# Roles that a person can act on, in Chromium's accessibility tree.
_ACTED_ON = {
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
  const told = [];
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
      if (ratio < 4.5) told.push(`${element.tagName}.${element.className}${part} ${ratio.toFixed(2)} ${element.textContent.slice(0, 20)}`);
    }
  }
  return told;
}
"""


@pytest.fixture(scope="module")
def site(kodalle_run: Path) -> Iterator[Site]:
    with model_site(kodalle_run / "model") as (site, _):
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Page]:
    with opened(browser, site.address) as (page, _):
        yield page


@pytest.fixture
def drawn(page: Page) -> Page:
    """With a finished drawing of two pictures and two more candidates, all folds open."""
    page.evaluate("() => document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    draw(page, CAPTION)
    wait_done(page)
    page.locator("[data-action=candidates]").click()
    return page


def _nameless(page: Page) -> list[str]:
    """What can be acted on or is looked at, but has no name to call it by."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    shown = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in _ACTED_ON]
    assert len(shown) > 2, "the tree was not read"
    return [node["role"]["value"] for node in shown if not node.get("name", {}).get("value", "").strip()]


def _states(page: Page) -> Iterator[str]:
    """Goes through what the page can look like, from a finished drawing on."""
    yield "board"
    page.locator("#drawings [data-action=open-0]").click()
    yield "viewer"
    page.locator("#viewer [data-action=remove]").click()
    yield "question"
    page.keyboard.press("Escape")
    page.locator("[data-action=repaint]").click()
    yield "repaint"
    page.locator("input[name=editor-kind][value=rows]").check(force=True)
    yield "rows"
    page.keyboard.press("Escape")
    page.locator("#caption").fill("네모 " * 120)
    page.locator("#draw").click()
    page.locator("#seed").fill("x")
    yield "faults"
    page.locator("#to-gallery").click()
    page.locator("#gallery-grid li").first.wait_for()
    yield "gallery"


@pytest.mark.parametrize("language", ["ko", "en"])
def test_everything_that_can_be_acted_on_has_a_name(drawn: Page, language: str) -> None:
    if language == "en":
        drawn.locator("#language-button").click()
    for state in _states(drawn):
        assert not _nameless(drawn), state


def test_the_check_of_names_finds_a_button_without_one(page: Page) -> None:
    page.evaluate("() => document.querySelector('#theme-button').removeAttribute('aria-label')")
    page.evaluate("() => document.querySelector('#theme-button').removeAttribute('title')")
    assert _nameless(page) == ["button"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(drawn: Page, scheme: str) -> None:
    drawn.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for state in _states(drawn):
        assert not drawn.evaluate(_LOW_CONTRAST), state


def test_a_chosen_theme_goes_before_the_system_and_stays(page: Page, site: Site) -> None:
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator("#theme-button").click()  # light
    page.locator("#theme-button").click()  # dark
    dark = page.evaluate(ground)
    assert dark != light
    assert not page.evaluate(_LOW_CONTRAST)
    page.goto(site.address)
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


def test_tab_goes_through_everything_in_reading_order_with_a_ring(drawn: Page) -> None:
    drawn.evaluate("() => document.activeElement.blur()")
    drawn.evaluate(
        "() => { document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex'); }"
    )
    stops = _tab_stops(drawn, "body")
    names = [stop["name"] for stop in stops]
    assert [stop["place"] for stop in stops] == sorted(stop["place"] for stop in stops)
    assert all(stop["hasRing"] for stop in stops), [stop["name"] for stop in stops if not stop["hasRing"]]
    assert names[0] == "A"  # the way past the header
    for needed in (
        "to-gallery",
        "language-button",
        "caption",
        "part",
        "n",
        "candidates",
        "seed",
        "temperature",
        "draw",
        "open-0",
        "star-0",
        "another",
    ):
        assert needed in names, names
    assert names.count("part") == 1  # a group of choices is one stop; arrows go on inside


def test_a_dialog_holds_the_focus_and_gives_it_back(drawn: Page) -> None:
    drawn.locator("#drawings [data-action=open-1]").focus()
    drawn.keyboard.press("Enter")
    expect(drawn.locator("#viewer")).to_be_visible()
    stops = _tab_stops(drawn, "#viewer")
    assert len(stops) >= 8
    # Chromium's own toolbar is the one place outside that Tab reaches; in the page, none
    assert all(stop["isInside"] for stop in stops)
    drawn.keyboard.press("Escape")
    expect(drawn.locator("#viewer")).to_be_hidden()
    expect(drawn.locator("#drawings [data-action=open-1]")).to_be_focused()


def test_arrows_turn_over_the_pictures_of_a_drawing(drawn: Page) -> None:
    drawn.locator("#drawings [data-action=open-0]").click()
    expect(drawn.locator("#viewer-title")).to_have_text("1위")
    drawn.keyboard.press("ArrowRight")
    expect(drawn.locator("#viewer-title")).to_have_text("2위")
    drawn.keyboard.press("ArrowLeft")
    expect(drawn.locator("#viewer-title")).to_have_text("1위")


def test_progress_is_told_in_few_words(page: Page) -> None:
    page.evaluate(
        """() => {
          window.told = [];
          const place = document.querySelector("body > .announcer");
          new MutationObserver(() => window.told.push(place.textContent)).observe(place, { childList: true });
        }"""
    )
    assert page.locator("body > .announcer").get_attribute("role") == "status"  # polite
    draw(page, CAPTION, n=2, candidates=8)
    wait_done(page)
    told = page.evaluate("() => window.told")
    assert told[-1] == "그림 2장이 완성되었습니다."
    assert len(told) <= 3, told


def test_landmarks_and_headings_lead_through_the_page(drawn: Page) -> None:
    for role, name in (("navigation", "화면"), ("form", "무엇을 그릴까요?"), ("region", "그림")):
        expect(drawn.get_by_role(role, name=name, exact=True)).to_have_count(1)
    for role in ("banner", "main", "contentinfo"):
        expect(drawn.get_by_role(role)).to_have_count(1)
    levels = drawn.locator("h1:visible, h2:visible, h3:visible, h4:visible").evaluate_all(
        "all => all.map((each) => Number(each.tagName[1]))"
    )
    assert levels == [1, 2, 3, 4]


def test_nothing_sticks_out_sideways_and_everything_is_large_enough_to_hit(drawn: Page) -> None:
    controls = drawn.locator("button, a, select, .chip, .swatch-choice")
    small = (
        "all => all.filter((each) => each.checkVisibility() && Math.min(each.offsetWidth, each.offsetHeight) < 24)"
        ".map((each) => each.outerHTML)"
    )
    for language in ("ko", "en"):
        assert drawn.evaluate("() => document.documentElement.lang") == language
        for width in (320, 360, 768, 1024, 1600):
            drawn.set_viewport_size({"width": width, "height": 800})
            assert drawn.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0, width
            assert not controls.evaluate_all(small), width  # WCAG 2.2, 2.5.8
        drawn.locator("#language-button").click()


def test_motion_stops_for_those_who_asked(drawn: Page) -> None:
    moving = "() => [...document.querySelectorAll('*')].filter((each) => parseFloat(getComputedStyle(each).transitionDuration) > 0).length"
    assert drawn.evaluate(moving) > 0
    drawn.emulate_media(reduced_motion="reduce")
    assert drawn.evaluate(moving) == 0
