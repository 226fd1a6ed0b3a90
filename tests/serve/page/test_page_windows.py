"""Nothing is lost by reloading, closing, or a second window."""

import pytest

from tests.browser_page import (
    CAPTION,
    MakeSlow,
    Open,
    Page,
    Site,
    StepGate,
    generate,
    needs_chromium,
    open_page,
    playwright,
    wait_done,
    wait_until,
)

expect = playwright.expect
pytestmark = needs_chromium


def test_a_reload_goes_on_with_the_same_random_seed(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    site, _ = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        generate(page, CAPTION, n=1, candidates=1, seed="")
        seed = page.locator(".card .facts").get_by_text("시드").inner_text()
        gate.allow(3)
        expect(page.locator(".card .state")).to_have_text("생성 중")
        page.reload()
        card = page.locator(".card")
        expect(card).to_have_count(1)
        expect(card.locator(".facts").get_by_text("시드")).to_have_text(seed)
        gate.open()
        wait_done(page)
        expect(card.locator(".facts").get_by_text("시드")).to_have_text(seed)
        open_page(page, site.address)
        expect(page.locator(".card")).to_have_count(1)  # done: nothing is offered again


def test_a_closed_window_leaves_an_offer_with_the_same_seed(open_in: Open, slow_site: MakeSlow, gate: StepGate) -> None:
    site, _ = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        generate(page, CAPTION, n=1, candidates=1, seed="77")
        gate.allow(3)
        expect(page.locator(".card .state")).to_have_text("생성 중")
        second = page.context.new_page()
        open_page(second, site.address)
        expect(second.locator(".card")).to_have_count(0)  # its window is at it
        page.close()
        open_page(second, site.address)
        card = second.locator(".card")
        expect(card.locator(".state")).to_have_text("화면이 닫혀 중단됨")
        expect(card.locator(".facts")).to_contain_text("77")
        gate.open()
        card.get_by_role("button", name="같은 시드로 다시").click()
        wait_done(second)
        open_page(second, site.address)
        expect(second.locator(".card")).to_have_count(1)


def test_an_offer_that_is_dismissed_or_cancelled_does_not_come_back(
    open_in: Open, slow_site: MakeSlow, gate: StepGate
) -> None:
    site, _ = slow_site()
    with open_in(site) as (page, complaints):
        complaints.may_fail = True
        generate(page, CAPTION, n=1, candidates=1, seed="5")
        gate.allow(3)
        expect(page.locator(".card .state")).to_have_text("생성 중")
        page.goto("about:blank")  # the same address at once would be a reload
        open_page(page, site.address)
        page.get_by_role("button", name="이 목록에서 치우기").click()
        generate(page, CAPTION, n=1, candidates=1, seed="6")
        page.get_by_role("button", name="취소", exact=True).click()
        wait_until(
            lambda: page.evaluate(
                "() => import('/page/store.js').then((m) => m.openStore()).then((s) => s.unended()).then((all) => !all.length)"
            )
        )
        open_page(page, site.address)
        expect(page.locator(".card")).to_have_count(0)


def test_a_second_window_shows_what_the_first_makes_changes_and_deletes(page: Page, site: Site) -> None:
    other = page.context.new_page()
    open_page(other, site.address)
    generate(page, CAPTION, n=2, candidates=2)
    wait_done(page)
    wait_done(other)
    expect(other.locator("#gallery-count")).to_have_text("1")
    page.get_by_role("button", name="1위 이미지 즐겨찾기").click()
    star = other.get_by_role("button", name="1위 이미지 즐겨찾기")
    expect(star).to_have_attribute("aria-pressed", "true")
    other.locator("#to-gallery").click()
    expect(other.locator("#gallery-grid .tile")).to_have_count(2)
    page.locator("#to-gallery").click()
    page.locator("#clear-gallery").click()
    page.locator("#question button[type=submit]").click()
    expect(other.locator("#gallery-grid .tile")).to_have_count(0)
    other.locator("#to-studio").click()
    expect(other.locator(".card")).to_have_count(0)


@pytest.mark.parametrize("way", ["Escape", "취소", "닫기"])
def test_strokes_are_discarded_only_when_confirmed(page: Page, way: str) -> None:
    generate(page, CAPTION, n=1, candidates=1)
    wait_done(page)
    page.get_by_role("button", name="크게 보기").first.click()
    page.get_by_role("button", name="일부 다시 생성").click()
    editor = page.locator("#editor")

    def dismiss() -> None:
        if way == "Escape":
            page.keyboard.press("Escape")
        else:
            editor.get_by_role("button", name=way, exact=True).click()

    page.locator("#editor canvas").focus()
    page.keyboard.press(" ")
    expect(page.locator("#editor-cells")).to_contain_text("1칸")
    dismiss()
    question = page.locator("#question")
    expect(question.get_by_role("heading")).to_have_text("칠한 것을 버릴까요?")
    page.keyboard.press("Escape")  # of the question: no
    expect(question).to_be_hidden()
    expect(editor).to_be_visible()
    expect(page.locator("#editor-cells")).to_contain_text("1칸")
    dismiss()
    question.get_by_role("button", name="버리기").click()
    expect(editor).to_be_hidden()
    page.get_by_role("button", name="크게 보기").first.click()
    page.get_by_role("button", name="일부 다시 생성").click()
    page.keyboard.press("Escape")  # nothing painted: nothing is asked
    expect(editor).to_be_hidden()
