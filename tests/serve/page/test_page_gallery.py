"""What was generated in the designers' page stays until the user deletes it, unless the disk is full or there is none."""

from tests.browser_page import (
    CAPTION,
    Open,
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


def test_images_settings_and_form_survive_a_reload(page: Page, site: Site) -> None:
    generate(page, CAPTION, n=2, candidates=3, seed="11")
    wait_done(page)
    generate(page, "초록 네모", n=1, candidates=1, seed="12")
    wait_done(page, 2)
    page.locator("#generations [data-action=star-0]").last.click()
    expect(page.locator("#generations [data-action=star-0]").last).to_have_attribute("aria-pressed", "true")
    content = downloaded(page, page.locator("#generations [data-action=download-0]").first.click)
    open_page(page, site.address)
    wait_done(page, 2)
    expect(page.locator("#caption")).to_have_value("초록 네모")
    expect(page.locator("#seed")).to_have_value("12")
    page.locator("#to-gallery").click()
    tiles = page.locator("#gallery-grid .tile")
    expect(tiles).to_have_count(3)
    expect(tiles.locator(".tile-caption").first).to_have_text("초록 네모")  # newest first
    assert downloaded(page, tiles.first.locator("[data-action=download-0]").click) == content
    page.locator("#only-favourites").check()
    expect(tiles).to_have_count(1)
    expect(tiles.locator(".tile-caption")).to_have_text(CAPTION)


def test_one_image_or_all_are_deleted_when_confirmed(page: Page, site: Site) -> None:
    generate(page, CAPTION, n=2, candidates=2)
    wait_done(page)
    page.locator("#generations [data-action=open-0]").click()
    page.locator("[data-action=remove]").click()
    expect(page.get_by_role("button", name="취소")).to_be_focused()  # the careful answer
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_visible()
    page.locator("[data-action=remove]").click()
    page.locator("#question").get_by_role("button", name="지우기").click()
    expect(page.locator(".card .rank")).to_have_count(1)
    expect(page.locator(".card .rank")).to_have_text("2위")
    page.locator("#to-gallery").click()
    expect(page.locator("#gallery-grid .tile")).to_have_count(1)
    page.locator("#clear-gallery").click()
    page.locator("#question").get_by_role("button", name="모두 지우기").click()
    expect(page.locator("#gallery-empty")).to_be_visible()
    open_page(page, site.address)
    expect(page.locator(".card")).to_have_count(0)


def test_a_full_disk_is_reported_and_the_image_can_be_downloaded(page: Page, site: Site) -> None:
    session = page.context.new_cdp_session(page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": site.address, "quotaSize": 2000})
    generate(page, CAPTION)
    wait_done(page)
    expect(page.locator(".card .warning")).to_contain_text("저장 공간이 가득 차")
    assert pixels(downloaded(page, page.locator("#generations [data-action=download-0]").click)[1]).shape == (32, 32, 3)
    page.locator("#generations [data-action=star-0]").click()
    expect(page.locator("#generations [data-action=star-0]")).to_have_attribute("aria-pressed", "true")
    session.send("Storage.overrideQuotaForOrigin", {"origin": site.address})
    page.locator("#generate").click()
    wait_done(page, 2)
    expect(page.locator(".card .warning")).to_have_count(1)
    page.locator("#to-gallery").click()
    expect(page.locator("#gallery-grid .tile")).to_have_count(2)


def test_without_a_database_the_page_works_and_says_what_is_lost(page: Page, site: Site) -> None:
    page.context.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    open_page(page, site.address)
    generate(page, CAPTION)
    wait_done(page)
    page.locator("#to-gallery").click()
    expect(page.locator("#gallery-fault")).to_contain_text("사라집니다")
    expect(page.locator("#gallery-grid .tile")).to_have_count(2)
    open_page(page, site.address)
    expect(page.locator(".card")).to_have_count(0)


def test_a_gallery_of_the_first_version_is_carried_over(open_in: Open, site: Site) -> None:
    """Version 1 of the database called the table `drawings` and an entry's images `pictures`."""
    with open_in(site) as (page, complaints):
        complaints.may_fail = True  # the icon has no icon
        generate(page, CAPTION, n=2, candidates=3)
        wait_done(page)
        page.goto(f"{site.address}/page/icon.svg")  # the same origin, and no page that holds the database open
        page.evaluate(
            """async () => {
              const done = (request) => new Promise((resolve, reject) => {
                request.onsuccess = () => resolve(request.result);
                request.onerror = () => reject(request.error);
              });
              const now = await done(indexedDB.open("kodalle"));
              const [{ images, ...rest }] = await done(now.transaction("generations").objectStore("generations").getAll());
              now.close();
              await done(indexedDB.deleteDatabase("kodalle"));
              const opening = indexedDB.open("kodalle", 1);
              opening.onupgradeneeded = () => opening.result.createObjectStore("drawings", { keyPath: "id" });
              const first = await done(opening);
              await done(first.transaction("drawings", "readwrite").objectStore("drawings").put({ ...rest, pictures: images }));
              first.close();
            }"""
        )
        open_page(page, site.address)
        wait_done(page)
        page.locator("#to-gallery").click()
        expect(page.locator("#gallery-grid .tile")).to_have_count(2)
        expect(page.locator("#gallery-grid .tile-caption").first).to_have_text(CAPTION)
        open_page(page, site.address)
        expect(page.locator("#gallery-count")).to_have_text("1")
