"""The designers' page draws what the API draws, shows it as it comes, and survives what goes wrong."""

import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from engine.pipeline.image_encoding import read_metadata
from serve.api.application import build_api
from serve.api.keys import add_key
from serve.local_pool import LocalPool
from serve.settings import Limits, ServeSettings
from serve.worker.decode_loop import DecodeLoop
from tests.browser_page import (
    Complaints,
    Page,
    Site,
    chromium,
    downloaded,
    draw,
    fill,
    model_site,
    module,
    needs_chromium,
    open_page,
    opened,
    playwright,
    wait_done,
    wait_until,
)

pytestmark = needs_chromium
expect = playwright.expect
expect.set_options(timeout=20_000)

CAPTION = "빨강 바탕에 파랑 네모"
Opened = AbstractContextManager[tuple[Page, Complaints]]
Open = Callable[..., Opened]
MakeSlow = Callable[..., tuple[Site, LocalPool]]


@pytest.fixture(scope="module")
def served(kodalle_run: Path) -> Iterator[tuple[Site, LocalPool]]:
    with model_site(kodalle_run / "model") as served:
        yield served


@pytest.fixture(scope="module")
def site(served: tuple[Site, LocalPool]) -> Site:
    return served[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def open_in(browser: Any) -> Open:
    return lambda site, **options: opened(browser, site.address, **options)


@pytest.fixture
def page(open_in: Open, site: Site) -> Iterator[Page]:
    with open_in(site) as (page, _):
        yield page


@pytest.fixture
def slow_site(kodalle_run: Path) -> Iterator[Callable[..., tuple[Site, LocalPool]]]:
    """`slow_site(max_queued_sequences=…)`: one slot, so that drawings take seconds and what comes later waits."""
    with contextlib.ExitStack() as stack:
        yield lambda **changes: stack.enter_context(model_site(kodalle_run / "model", num_slots=1, **changes))


@pytest.fixture
def site_with(kodalle_run: Path, served: tuple[Site, LocalPool]) -> Iterator[Callable[..., Site]]:
    """`site_with(keys_file=…)`: the same worker behind an edge with other settings."""
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> Site:
            settings = ServeSettings(model=str(kodalle_run / "model")).model_copy(update=changes)
            site = Site(lambda: build_api(served[1], settings))
            stack.callback(site.stop)
            return site

        yield make


def _slow_steps_down(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """A model of this size is drawn faster than a busy browser paints: each step of it takes so much longer."""
    count_step = DecodeLoop._count_step

    def slowly(decode_loop: DecodeLoop, begun_s: float) -> None:
        time.sleep(seconds)
        count_step(decode_loop, begun_s)

    monkeypatch.setattr(DecodeLoop, "_count_step", slowly)


def _recorded(page: Page, what: str) -> Callable[[], list[str]]:
    """From now on, every state text ("textContent") or number of drawn rows ("rows") that the board shows, in order."""
    page.evaluate(
        """(what) => {
          window.seen = [];
          const look = (changes) => {
            for (const { target } of changes) {
              if (what === "rows") window.seen.push(target.getAttribute("data-rows"));
              else for (const state of document.querySelectorAll(".state")) window.seen.push(state.textContent);
            }
          };
          const watched = what === "rows" ? { attributeFilter: ["data-rows"] } : { childList: true };
          new MutationObserver(look).observe(document.getElementById("drawings"), { subtree: true, ...watched });
        }""",
        what,
    )
    return lambda: list(page.evaluate("() => window.seen"))


# -------------------------------------------------------------------------------------------------- what it draws


def test_the_page_shows_the_bytes_that_a_program_gets(page: Page, site: Site) -> None:
    draw(page, CAPTION, n=3, candidates=5, seed="18446744073709551615")  # the largest: JavaScript's numbers round it
    wait_done(page)
    wanted = site.post(
        "/v1/images/generations",
        {"prompt": CAPTION, "n": 3, "candidates": 5, "seed": 2**64 - 1, "all_candidates": True},
    )
    for index, image in enumerate(wanted["data"] + wanted["candidates"]):
        if index == 3:
            page.locator("[data-action=candidates]").click()
        if index < 3:
            name, content = downloaded(page, page.locator(f"#drawings [data-action=download-{index}]").click)
        else:
            page.locator(f"#drawings [data-action=open-{index}]").click()
            name, content = downloaded(page, page.locator("#viewer [data-action=download]").click)
            page.keyboard.press("Escape")
        assert name == f"kodalle-18446744073709551615-{image['candidate']}.png"
        assert content == base64.b64decode(image["b64_json"])
        made = read_metadata(content)
        assert (made["caption"], made["seed"], made["candidate"]) == (CAPTION, 2**64 - 1, image["candidate"])


def test_the_best_are_ranked_with_scores_and_named_for_those_who_cannot_see(page: Page, site: Site) -> None:
    draw(page, CAPTION, n=3, candidates=5, seed="3")
    wait_done(page)
    wanted = site.post("/v1/images/generations", {"prompt": CAPTION, "n": 3, "candidates": 5, "seed": 3})["data"]
    tiles = page.locator(".card.done > .tiles > li")
    expect(tiles).to_have_count(3)
    for index, image in enumerate(wanted):
        tile = tiles.nth(index)
        expect(tile.locator(".rank")).to_have_text(f"{index + 1}위")
        expect(tile.locator(".score")).to_have_text(f"{image['clip_score']:.3f}")
        expect(tile.locator("img")).to_have_attribute("alt", f"{CAPTION} {index + 1}위 그림")
        # 32 pixels shown at ten times their size: hard edges, not a blur
        assert tile.locator("img").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    expect(page.locator(".candidates li")).to_have_count(0)
    page.get_by_role("button", name="후보 5장 모두 보기").click()
    expect(page.locator(".candidates li")).to_have_count(2)


def test_pictures_appear_row_by_row(open_in: Open, slow_site: MakeSlow, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow_steps_down(monkeypatch, seconds=0.05)
    with open_in(slow_site()[0]) as (page, _):
        rows = _recorded(page, "rows")
        draw(page, CAPTION, n=1, candidates=2)
        wait_done(page)
        seen = [int(text) for text in rows()]
    assert seen == sorted(seen)
    assert len(set(seen)) >= 4, seen  # of 8 rows; the browser may skip some that came in one read
    assert seen[0] < 8


def test_a_given_seed_draws_again_what_was_drawn(page: Page) -> None:
    draw(page, CAPTION, seed="")
    wait_done(page)
    first = downloaded(page, page.locator("#drawings [data-action=download-0]").click)
    page.locator("#caption").fill("초록 네모")
    page.locator("#n").fill("1")
    page.get_by_role("button", name="설정 모두 다시 쓰기").click()
    expect(page.locator("#caption")).to_have_value(CAPTION)
    expect(page.locator("#n")).to_have_value("2")
    page.locator("#draw").click()
    wait_done(page, 2)
    assert downloaded(page, page.locator("#drawings [data-action=download-0]").first.click) == first
    page.locator("#seed-clear").click()
    page.locator("#draw").click()
    wait_done(page, 3)
    assert downloaded(page, page.locator("#drawings [data-action=download-0]").first.click) != first


def test_enter_draws_but_not_while_a_syllable_is_composed(page: Page) -> None:
    page.locator("#caption").fill(CAPTION)
    page.locator("#caption").evaluate(
        "box => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    expect(page.locator(".card")).to_have_count(0)
    page.locator("#caption").press("Enter")
    wait_done(page)
    page.locator("#temperature").evaluate("field => field.closest('details').open = true")
    page.locator("#temperature").press("Control+Enter")
    wait_done(page, 2)


def test_captions_are_counted_before_they_are_sent(page: Page) -> None:
    page.locator("#caption").fill("가" * 214)
    expect(page.locator("#caption-count")).to_have_text("214 / 200자")
    page.locator("#draw").click()
    expect(page.locator("#caption-fault")).to_contain_text("14자가 넘쳤습니다")
    expect(page.locator(".card")).to_have_count(0)
    page.locator("#caption").fill("네모 " * 20)
    expect(page.locator("#caption-tokens")).to_have_class("hint warning")
    expect(page.locator("#caption-tokens")).to_contain_text("22 / 12")  # [CLS], twenty words, [SEP]
    page.locator("#caption").fill(CAPTION)
    expect(page.locator("#caption-tokens")).to_have_class("hint")


def test_settings_that_cannot_be_drawn_with_are_told_at_their_field(page: Page) -> None:
    page.locator("#caption").fill(CAPTION)
    page.locator("#advanced").evaluate("fold => fold.open = true")
    for name, value in (("n", "11"), ("candidates", "3"), ("seed", "abc"), ("seed", str(2**64)), ("top_p", "0")):
        right = page.locator(f"#{name}").input_value()
        page.locator(f"#{name}").fill(value)
        page.locator("#draw").click()
        expect(page.locator("#settings-fault")).to_be_visible()
        expect(page.locator(f"#{name}")).to_be_focused()
        expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
        page.locator(f"#{name}").fill(right)
        expect(page.locator("#settings-fault")).to_be_hidden()
    expect(page.locator(".card")).to_have_count(0)
    page.locator("#draw").click()  # the negative control: nothing else was in the way
    wait_done(page)


def test_captions_and_errors_are_text_and_never_html(page: Page) -> None:
    caption = "<img src=x onerror=alert(1)> <b>굵게</b>"
    draw(page, caption)
    wait_done(page)
    expect(page.locator(".card h3")).to_have_text(caption)
    page.locator("#drawings [data-action=open-0]").click()
    expect(page.locator(".viewer-caption")).to_have_text(caption)
    assert page.locator("img[src=x], .card b, .viewer-caption b").count() == 0


@pytest.mark.parametrize("act", ["fetch('https://example.invalid/')", "Promise.reject(new Error('oversight'))"])
def test_the_watch_over_the_page_notices_foreign_requests_and_errors(open_in: Open, site: Site, act: str) -> None:
    def visit() -> None:
        with open_in(site) as (page, _):
            page.evaluate(f"() => {{ setTimeout(() => {act}); }}")
            page.wait_for_timeout(300)

    with pytest.raises(AssertionError, match="complaints"):
        visit()


# --------------------------------------------------------------------------------------------- queue, cancel, errors


def test_several_are_queued_and_each_can_be_cancelled(
    open_in: Open, slow_site: MakeSlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_steps_down(monkeypatch, seconds=0.02)
    site, pool = slow_site(deadline_s=3600)  # step times of a first drawing are no promise
    with open_in(site) as (page, _):
        states = _recorded(page, "textContent")
        for candidates in (64, 2, 2):  # one slot and 64 steps each: more than a minute
            draw(page, CAPTION, n=1, candidates=candidates)
        cards = page.locator(".card")  # newest first
        expect(cards.nth(2).locator(".state")).to_have_text("그리는 중")
        expect(cards.nth(0).locator(".state")).to_have_text("앞 작업을 기다리는 중")  # two at the server are enough
        wait_until(lambda: any("대기 1번째" in text for text in states()))
        cards.nth(1).locator("[data-action=cancel]").click()
        expect(cards.nth(1).locator(".state")).to_have_text("취소함")
        expect(cards.nth(0).locator(".state")).not_to_have_text("앞 작업을 기다리는 중")
        page.locator("#cancel-all").click()
        expect(page.locator(".card.cancelled")).to_have_count(3)
        wait_until(lambda: pool.worker.slots_in_use == pool.worker.queued_sequences == 0)
        cards.nth(0).locator("[data-action=again]").click()
        expect(cards.nth(0).locator(".state")).to_have_text("그리는 중")


def test_a_busy_server_is_asked_again(open_in: Open, slow_site: MakeSlow, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow_steps_down(monkeypatch, seconds=0.01)
    site, pool = slow_site(max_queued_sequences=12)
    with open_in(site) as (page, complaints), open_in(site) as (other, _):
        complaints.may_fail = True
        fill(page, CAPTION, n=1, candidates=8)
        draw(other, CAPTION, n=1, candidates=12)
        wait_until(lambda: pool.worker.queued_sequences > 4)
        page.locator("#draw").click()  # more than the queue has room for beside the first
        expect(page.locator(".state")).to_contain_text("서버가 바빠")
        expect(other.locator(".state")).to_have_text("그리는 중")
        wait_done(page, timeout_s=60)


def test_what_the_server_refuses_is_told_in_the_language_shown(open_in: Open, site_with: Callable[..., Site]) -> None:
    site = site_with(limits=Limits(max_prompt_characters=50))
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        draw(page, "네모 " * 20)
        expect(page.locator(".card.failed .fault")).to_contain_text("50자까지")
        page.locator("#language-button").click()
        expect(page.locator(".card.failed .fault")).to_contain_text("at most 50")
        expect(page.locator("html")).to_have_attribute("lang", "en")


def test_a_server_that_goes_away_costs_no_text_and_no_drawing(open_in: Open, slow_site: MakeSlow) -> None:
    site, pool = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        draw(page, CAPTION, n=1, candidates=6, seed="5")
        expect(page.locator(".state")).to_have_text("그리는 중")
        page.locator("#caption").fill("초록 네모")
        site.stop()
        expect(page.locator("#notice")).to_contain_text("연결이 끊겼거나")
        expect(page.locator(".state")).to_have_text("연결을 기다리는 중")
        expect(page.locator("#caption")).to_have_value("초록 네모")
        wait_until(lambda: pool.worker.slots_in_use == 0)  # the drawing of a connection that is gone
        site.start()
        expect(page.locator("#notice")).to_be_hidden()
        wait_done(page)
        content = downloaded(page, page.locator("#drawings [data-action=download-0]").click)[1]
    wanted = site.post("/v1/images/generations", {"prompt": CAPTION, "n": 1, "candidates": 6, "seed": 5})
    assert content == base64.b64decode(wanted["data"][0]["b64_json"])


def test_a_key_is_asked_for_kept_for_the_tab_and_forgotten(
    open_in: Open, site_with: Callable[..., Site], tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.yaml", "designers", scopes=["generate"])
    site = site_with(keys_file=str(tmp_path / "keys.yaml"))
    with open_in(site, start=False) as (page, complaints):
        complaints.may_fail = True
        page.goto(site.address)
        page.locator("#key-input").fill("sk-kodalle-wrong")
        page.get_by_role("button", name="쓰기", exact=True).click()
        expect(page.locator("#question")).to_contain_text("받아들이지 않았습니다")
        page.locator("#key-input").fill(key)
        page.locator("#key-input").press("Enter")
        draw(page, CAPTION)
        wait_done(page)
        assert page.evaluate("() => [...Object.values(localStorage)].join()").find(key) == -1
        assert page.evaluate("() => sessionStorage.getItem('kodalle.key')") == key
        open_page(page, site.address)  # the same tab: not asked again
        page.get_by_role("button", name="API 키 사용 중").click()
        page.get_by_role("button", name="지우기", exact=True).click()
        assert page.evaluate("() => sessionStorage.getItem('kodalle.key')") is None
        page.locator("#draw").click()
        page.locator("#key-input").fill(key)
        page.locator("#key-remember").check()
        page.locator("#key-input").press("Enter")
        wait_done(page, 2)
        assert page.evaluate("() => localStorage.getItem('kodalle.key')") == key


def test_settings_are_copied_as_a_request_that_draws_the_same(page: Page, site: Site) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    draw(page, CAPTION, seed="18446744073709551615")
    wait_done(page)
    page.locator("#drawings [data-action=open-0]").click()
    page.locator("[data-action=copy]").click()
    expect(page.locator("#toast")).to_have_text("설정을 복사했습니다.")
    copied = json.loads(page.evaluate("() => navigator.clipboard.readText()"))
    answer = site.post("/v1/images/generations", copied)
    content = downloaded(page, page.locator("#viewer [data-action=download]").click)[1]
    assert content == base64.b64decode(answer["data"][0]["b64_json"])


# ---------------------------------------------------------------------------------------------- the stream's parser


def test_events_are_read_however_the_network_cuts_them(page: Page) -> None:
    text = (
        ': hello\r\nevent: a\r\ndata: {"x": "가"}\r\n\r\ndata: one\rdata: two\r\rdata:three\n\nevent: cut\ndata: lost'
    )
    read = """
      const bytes = new TextEncoder().encode(a.text);
      const found = [];
      const stream = new ReadableStream({
        start(controller) {
          for (let at = 0; at < bytes.length; at += a.step) controller.enqueue(bytes.slice(at, at + a.step));
          controller.close();
        },
      });
      for await (const { event, data } of m.readEvents(stream)) found.push([event, data]);
      return found;
    """
    for step in range(1, 12):
        found = module(page, "events", read, {"text": text, "step": step})
        assert found == [["a", '{"x": "가"}'], ["message", "one\ntwo"], ["message", "three"]], step
