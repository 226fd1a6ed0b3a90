"""The designers' page generates what the API generates, shows it as it comes, and survives what goes wrong."""

import base64
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.pipeline.image_encoding import read_metadata
from serve.api.keys import add_key
from serve.settings import Limits
from tests.browser_page import (
    CAPTION,
    MakeSite,
    MakeSlow,
    Open,
    Page,
    Site,
    StepGate,
    downloaded,
    fill,
    generate,
    module,
    needs_chromium,
    open_page,
    playwright,
    wait_done,
    wait_until,
)

pytestmark = needs_chromium
expect = playwright.expect


def _recorded_states(page: Page) -> Callable[[], list[str]]:
    """From now on, every text of a state that the board shows, in order."""
    page.evaluate(
        """() => {
          window.seen = [];
          const look = () => {
            for (const state of document.querySelectorAll(".state")) window.seen.push(state.textContent);
          };
          new MutationObserver(look).observe(document.getElementById("generations"), { subtree: true, childList: true });
        }"""
    )
    return lambda: list(page.evaluate("() => window.seen"))


# ------------------------------------------------------------------------------------------------ what it generates


def test_the_page_shows_the_bytes_that_a_program_gets(page: Page, site: Site) -> None:
    generate(
        page, CAPTION, n=3, candidates=5, seed="18446744073709551615"
    )  # the largest: JavaScript's numbers round it
    wait_done(page)
    wanted = site.post(
        "/v1/images/generations",
        {"prompt": CAPTION, "n": 3, "candidates": 5, "seed": 2**64 - 1, "all_candidates": True},
    )
    for index, image in enumerate(wanted["data"] + wanted["candidates"]):
        if index == 3:
            page.locator("[data-action=candidates]").click()
        if index < 3:
            name, content = downloaded(page, page.locator(f"#generations [data-action=download-{index}]").click)
        else:
            page.locator(f"#generations [data-action=open-{index}]").click()
            name, content = downloaded(page, page.locator("#viewer [data-action=download]").click)
            page.keyboard.press("Escape")
        assert name == f"kodalle-18446744073709551615-{image['candidate']}.png"
        assert content == base64.b64decode(image["b64_json"])
        made = read_metadata(content)
        assert (made["caption"], made["seed"], made["candidate"]) == (CAPTION, 2**64 - 1, image["candidate"])


def test_the_best_are_ranked_with_scores_and_named_for_those_who_cannot_see(page: Page, site: Site) -> None:
    generate(page, CAPTION, n=3, candidates=5, seed="3")
    wait_done(page)
    wanted = site.post("/v1/images/generations", {"prompt": CAPTION, "n": 3, "candidates": 5, "seed": 3})["data"]
    tiles = page.locator(".card.done > .tiles > li")
    expect(tiles).to_have_count(3)
    for index, image in enumerate(wanted):
        tile = tiles.nth(index)
        expect(tile.locator(".rank")).to_have_text(f"{index + 1}위")
        expect(tile.locator(".score [aria-hidden]")).to_contain_text(f"{image['clip_score']:.3f}")
        expect(tile.locator("img")).to_have_attribute("alt", f"{CAPTION} {index + 1}위 이미지")
        # 32 pixels shown at ten times their size: hard edges, not a blur
        assert tile.locator("img").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    expect(page.locator(".candidates li")).to_have_count(0)
    page.get_by_role("button", name="후보 5장 모두 보기").click()
    expect(page.locator(".candidates li")).to_have_count(2)


def test_previews_appear_row_by_row(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    # Four at once: one or two would be decoded speculatively, with several tokens a step.
    with open_in(slow_site(num_slots=4)[0]) as (page, _):
        generate(page, CAPTION, n=4, candidates=4)
        for row in range(1, 8):
            gate.allow(8)  # tokens a row
            expect(page.locator("[data-candidate='0']")).to_have_attribute("data-rows", str(row))
            expect(page.locator("[data-candidate='0'] img")).to_have_attribute("alt", "후보 1 미리보기")
        gate.open()
        wait_done(page)


def test_a_seed_generates_the_same_images_again(page: Page) -> None:
    generate(page, CAPTION, seed="")
    wait_done(page)
    first = downloaded(page, page.locator("#generations [data-action=download-0]").click)
    page.locator("#caption").fill("초록 네모")
    page.locator("#n").fill("1")
    page.get_by_role("button", name="설정 모두 다시 쓰기").click()
    expect(page.locator("#caption")).to_have_value(CAPTION)
    expect(page.locator("#n")).to_have_value("2")
    page.locator("#generate").click()
    wait_done(page, 2)
    assert downloaded(page, page.locator("#generations [data-action=download-0]").first.click) == first
    page.locator("#seed-clear").click()
    page.locator("#generate").click()
    wait_done(page, 3)
    assert downloaded(page, page.locator("#generations [data-action=download-0]").first.click) != first


def test_enter_generates_but_not_while_a_syllable_is_composed(page: Page) -> None:
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
    page.locator("#generate").click()
    expect(page.locator("#caption-fault")).to_contain_text("14자가 넘쳤습니다")
    expect(page.locator(".card")).to_have_count(0)
    page.locator("#caption").fill("네모 " * 20)
    expect(page.locator("#caption-tokens")).to_have_class("hint warning")
    expect(page.locator("#caption-tokens")).to_contain_text("22 / 12")  # [CLS], twenty words, [SEP]
    page.locator("#caption").fill(CAPTION)
    expect(page.locator("#caption-tokens")).to_have_class("hint")


def test_settings_out_of_bounds_are_reported_at_their_field(page: Page) -> None:
    page.locator("#caption").fill(CAPTION)
    page.locator("#advanced").evaluate("fold => fold.open = true")
    for name, value in (("n", "11"), ("candidates", "3"), ("seed", "abc"), ("seed", str(2**64)), ("top_p", "0")):
        right = page.locator(f"#{name}").input_value()
        page.locator(f"#{name}").fill(value)
        page.locator("#generate").click()
        expect(page.locator("#settings-fault")).to_be_visible()
        expect(page.locator(f"#{name}")).to_be_focused()
        expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
        page.locator(f"#{name}").fill(right)
        expect(page.locator("#settings-fault")).to_be_hidden()
    expect(page.locator(".card")).to_have_count(0)
    page.locator("#generate").click()  # the negative control: nothing else was in the way
    wait_done(page)


def test_the_forms_bounds_are_the_servers(open_in: Open, site_with: MakeSite) -> None:
    site = site_with(limits=Limits(max_images=3, max_candidates=9))
    with urllib.request.urlopen(f"{site.address}/v1/models") as answer:
        bounds = json.load(answer)["data"][0]["sampling_params"]
    assert (bounds["n"]["maximum"], bounds["candidates"]["maximum"]) == (3, 9)
    names = {"candidates": "candidates", "n": "n", "temperature": "temperature", "guidance": "guidance_scale"}
    names |= {"top_k": "top_k", "top_p": "top_p"}
    check = """
      ([name, value]) => import('/page/settings.js').then((m) => {
        document.getElementById(name).value = value;
        try { m.readSettings(); return ""; } catch (error) { return error.field; }
      })"""
    with open_in(site) as (page, _):
        for name, api_name in names.items():
            least, most = bounds[api_name]["minimum"], bounds[api_name]["maximum"]
            field = {"top_k": "topK", "top_p": "topP"}.get(name, name)
            for value in (least - 1, most + 1):
                assert page.evaluate(check, [name, str(value)]) == field, (name, value)
            assert page.evaluate(check, [name, "0"]) == ("" if least == 0 or bounds[api_name]["or_zero"] else field)
            for value in (least, most):
                expected = "candidates" if (name, value) == ("candidates", least) else ""  # fewer than the images shown
                assert page.evaluate(check, [name, str(value)]) == expected, (name, value)


def test_captions_and_errors_are_text_and_never_html(page: Page) -> None:
    caption = "<img src=x onerror=alert(1)> <b>굵게</b>"
    generate(page, caption)
    wait_done(page)
    expect(page.locator(".card h3")).to_have_text(caption)
    page.locator("#generations [data-action=open-0]").click()
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


def test_requests_are_queued_and_each_can_be_cancelled(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    site, pool = slow_site()
    with open_in(site) as (page, _):
        states = _recorded_states(page)
        for candidates in (64, 2, 2):
            generate(page, CAPTION, n=1, candidates=candidates)
        cards = page.locator(".card")  # newest first
        expect(cards.nth(1).locator(".state")).to_contain_text("대기 1번째")
        gate.allow(1)
        expect(cards.nth(2).locator(".state")).to_have_text("생성 중")
        expect(cards.nth(0).locator(".state")).to_have_text("앞 작업을 기다리는 중")  # two at the server are enough
        cards.nth(1).locator("[data-action=cancel]").click()
        expect(cards.nth(1).locator(".state")).to_have_text("취소함")
        expect(cards.nth(0).locator(".state")).to_have_class("state queued")
        page.locator("#cancel-all").click()
        expect(page.locator(".card.cancelled")).to_have_count(3)
        gate.open()
        wait_until(lambda: pool.worker.slots_in_use == pool.worker.queued_sequences == 0)
        cards.nth(0).locator("[data-action=retry]").click()
        wait_done(page)
        assert "생성 중" in states()


def test_a_request_to_a_busy_server_is_sent_again(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    site, pool = slow_site(max_queued_sequences=3)
    with open_in(site) as (page, complaints), open_in(site) as (other, _):
        complaints.may_fail = True
        fill(page, CAPTION, n=1, candidates=2)
        generate(other, CAPTION, n=1, candidates=3)
        wait_until(lambda: pool.worker.queued_sequences == 2)
        page.locator("#generate").click()  # does not fit into the queue beside the first
        expect(page.locator(".state")).to_contain_text("서버가 바빠")
        gate.open()
        wait_done(other)
        wait_done(page)


def _refused(page: Page, times: int, *, code: str = "queue_full") -> list[int]:
    """Answers that many generations with 429 and 90 seconds; the list has their count."""
    count = [0]
    error = {"message": "full", "message_ko": "가득", "type": "rate_limit_error", "param": None, "code": code}

    def answer(route: Any) -> None:
        count[0] += 1
        if count[0] > times:
            route.continue_()
        else:
            headers = {"retry-after": "90", "content-type": "application/json"}
            route.fulfill(status=429, headers=headers, body=json.dumps({"error": error}))

    page.route("**/v1/images/generations", answer)
    return count


def test_a_busy_server_is_waited_for_as_it_says_however_often(open_in: Open, site: Site) -> None:
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        count = _refused(page, 7)
        page.clock.install()
        generate(page, CAPTION, n=1, candidates=1, seed="5")
        state = page.locator(".state")
        for number in range(1, 8):
            expect(state).to_have_text("서버가 바빠 1분 30초 뒤에 다시 보냅니다")
            page.clock.run_for(30_000)
            expect(state).to_have_text("서버가 바빠 1분 0초 뒤에 다시 보냅니다")
            assert count == [number], "sent again before its time"
            page.clock.run_for(60_000)
        wait_done(page)
        expect(page.locator(".card .facts")).to_contain_text("시드 5")
        assert count == [8]


def test_what_waits_for_a_busy_server_can_be_cancelled_and_survives_a_reload(open_in: Open, site: Site) -> None:
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        count = _refused(page, 2, code="rate_limit_exceeded")
        generate(page, CAPTION, n=1, candidates=1, seed="5")
        expect(page.locator(".state")).to_contain_text("이 키의 한도")
        page.locator("[data-action=cancel]").click()
        expect(page.locator(".state")).to_have_text("취소함")
        page.locator("[data-action=retry]").click()
        expect(page.locator(".state")).to_contain_text("이 키의 한도")
        page.reload()
        wait_done(page)
        assert count == [3]


def test_errors_of_the_server_are_shown_in_the_language_of_the_page(open_in: Open, site_with: MakeSite) -> None:
    site = site_with(limits=Limits(max_prompt_characters=50))
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        generate(page, "네모 " * 20)
        expect(page.locator(".card.failed .fault")).to_contain_text("50자까지")
        page.locator("#language-button").click()
        expect(page.locator(".card.failed .fault")).to_contain_text("the limit is 50")
        expect(page.locator("html")).to_have_attribute("lang", "en")


def test_a_server_that_restarts_costs_no_text_and_no_generation(
    open_in: Open, slow_site: MakeSlow, gate: StepGate
) -> None:
    site, pool = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        generate(page, CAPTION, n=1, candidates=6, seed="5")
        gate.allow(1)
        expect(page.locator(".state")).to_have_text("생성 중")
        page.locator("#caption").fill("초록 네모")
        site.stop()
        expect(page.locator("#notice")).to_contain_text("연결이 끊겼거나")
        expect(page.locator(".state")).to_have_text("연결을 기다리는 중")
        expect(page.locator("#caption")).to_have_value("초록 네모")
        gate.open()
        wait_until(lambda: pool.worker.slots_in_use == 0)  # the generation of the lost connection is cancelled
        site.start()
        expect(page.locator("#notice")).to_be_hidden()
        wait_done(page)
        content = downloaded(page, page.locator("#generations [data-action=download-0]").click)[1]
    wanted = site.post("/v1/images/generations", {"prompt": CAPTION, "n": 1, "candidates": 6, "seed": 5})
    assert content == base64.b64decode(wanted["data"][0]["b64_json"])


def test_a_key_is_requested_kept_for_the_tab_and_removed(open_in: Open, site_with: MakeSite, tmp_path: Path) -> None:
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
        generate(page, CAPTION)
        wait_done(page)
        assert page.evaluate("() => [...Object.values(localStorage)].join()").find(key) == -1
        assert page.evaluate("() => sessionStorage.getItem('kodalle.key')") == key
        open_page(page, site.address)  # the same tab: no second question
        page.get_by_role("button", name="API 키 사용 중").click()
        page.get_by_role("button", name="지우기", exact=True).click()
        expect(page.locator("#key-button")).to_be_hidden()
        assert page.evaluate("() => sessionStorage.getItem('kodalle.key')") is None
        page.locator("#generate").click()
        page.locator("#key-input").fill(key)
        page.locator("#key-remember").check()
        page.locator("#key-input").press("Enter")
        wait_done(page, 2)
        assert page.evaluate("() => localStorage.getItem('kodalle.key')") == key


def test_settings_are_copied_as_a_request_that_generates_the_same(page: Page, site: Site) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    generate(page, CAPTION, seed="18446744073709551615")
    wait_done(page)
    page.locator("#generations [data-action=open-0]").click()
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
