"""Screenshots of the designers' page in headless Chromium, with images that a model generates.

    python benchmarks/page_screenshots.py models/clothing --out benchmarks/results/page
    python benchmarks/page_screenshots.py models/clothing --only words

Nothing is arranged but the order of clicks: the images are what the model generates for its own example captions, with the
seeds below. It needs `/usr/bin/chromium` (Debian: apt install chromium fonts-nanum) and `pip install playwright`.
"""

import argparse
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from serve.api.application import build_api
from serve.api.listener import listener
from serve.local_pool import LocalPool
from serve.settings import ServeSettings

CHROMIUM = "/usr/bin/chromium"
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
_DESKTOP, _PHONE = (1280, 780), (360, 740)
# Few enough that 16 candidates are generated in turns, so that a generation can be shown half way.
_SLOTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/page"))
    parser.add_argument("--only", choices=tuple(SHOTS), help="one part of them; default: all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with serving(arguments.model) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=_ARGUMENTS)
        for name, photograph in SHOTS.items():
            if arguments.only in (None, name):
                photograph(browser, address, arguments.out)
        browser.close()


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The API server and a worker on a free port of this machine; yields the address."""
    settings = ServeSettings(model=model, num_slots=_SLOTS, deadline_s=3600)  # a busy machine is no reason to refuse
    pool = LocalPool(settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = listener(build_api(pool, settings), host="127.0.0.1", port=0, drain_s=5)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(timeout=20)
    pool.close()


@contextmanager
def opened(
    browser: Browser, address: str, size: tuple[int, int], *, scheme: str, scale: float = 1, language: str = "ko"
) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        locale="ko-KR",
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=scale,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(400_000)  # milliseconds; four generations with few slots take a minute on a busy machine
    page.goto(address)
    page.locator("#model-info:not(:empty)").wait_for()
    if language == "en":
        page.locator("#language-button").click()
    yield page
    context.close()


def photograph_desktop(browser: Browser, address: str, out: Path) -> None:
    """A generation in progress, its result with all candidates, and a part painted over."""
    with opened(browser, address, _DESKTOP, scheme="light") as page:
        page.locator("#candidates").fill("8")
        generate_example(page, 4, seed=7)
        page.locator('[data-candidate="0"][data-rows]:not([data-rows="1"])').wait_for()
        save(page, out / "generation-ko.png")
        page.locator(".card.done").wait_for()
        page.locator("[data-action=candidates]").click()
        save(page, out / "candidates-ko.png")
        page.locator("#generations [data-action=open-0]").click()
        page.locator("[data-action=inpaint]").click()
        settle(page)
        paint(page, [(0.3, 0.62), (0.7, 0.62), (0.7, 0.72), (0.32, 0.72)])
        write(Image.open(io.BytesIO(page.screenshot())), out / "inpaint-ko.png")


def photograph_dark(browser: Browser, address: str, out: Path) -> None:
    """In English and dark: several requests at once, and the gallery they end in."""
    with opened(browser, address, _DESKTOP, scheme="dark") as page:
        page.locator("#language-button").click()
        page.locator("#candidates").fill("8")
        for number, seed in ((3, 11), (1, 12), (2, 13), (5, 14)):
            generate_example(page, number, seed=seed)
        page.locator(".card.done").first.wait_for()
        save(page, out / "queue-en.png")
        page.locator(".card.done").nth(3).wait_for()
        page.locator("#to-gallery").click()
        page.locator("#gallery-grid li").nth(15).wait_for()
        save(page, out / "gallery-en.png")


def photograph_words(browser: Browser, address: str, out: Path) -> None:
    """Words that the model does not know, in both languages, while they are written."""
    texts = {"ko": "봄에 입기 좋은 하늘색 린넨 셔츠", "en": "a sky blue linen shirt with short sleeves"}
    for language, text in texts.items():
        with opened(browser, address, _DESKTOP, scheme="light") as page:
            if language == "en":
                page.locator("#language-button").click()
            page.locator("#caption").fill(text)
            page.locator("#caption-unknown").wait_for()
            save(page, out / f"words-{language}.png")


def photograph_keeping(browser: Browser, address: str, out: Path) -> None:
    """The gallery with images chosen, two of them compared, and a size to download: in both languages, on desktop and phone."""
    with opened(browser, address, _DESKTOP, scheme="light") as page:
        fill_gallery(page)
        for language in ("ko", "en"):
            choose(page, (0, 2, 4))
            save(page, out / f"gallery-chosen-{language}.png")
            compare(page, 40)
            save(page, out / f"compare-{language}.png")
            page.keyboard.press("Escape")
            page.locator("#gallery-grid [data-action^=open]").first.click()
            page.locator("#viewer-size").select_option(index=1)
            save(page, out / f"viewer-size-{language}.png")
            page.keyboard.press("Escape")
            page.locator("#selection [data-action=let-go]").click()
            page.locator("#language-button").click()
    with opened(browser, address, _PHONE, scheme="light", scale=1.25) as page:
        fill_gallery(page)
        for language, name in {"ko": "봄 기획", "en": "Spring"}.items():
            choose(page, (0, 2))
            page.mouse.move(1, 1)
            shots = [page.screenshot()]
            page.locator("#selection [data-action=collect]").click()
            page.locator("#collection-new").fill(name)
            shots.append(page.screenshot())
            page.keyboard.press("Escape")
            compare(page, 60)
            shots.append(page.screenshot())
            page.keyboard.press("Escape")
            page.locator("#selection [data-action=let-go]").click()
            page.locator("#language-button").click()
            write(side_by_side(shots), out / f"phone-keeping-{language}.png")


def photograph_phone(browser: Browser, address: str, out: Path) -> None:
    """The form, a result, and one image large, side by side, in both languages."""
    with opened(browser, address, _PHONE, scheme="light", scale=1.25) as page:
        forms = [page.screenshot()]
        page.locator("#language-button").click()
        forms.append(page.screenshot())
        page.locator("#language-button").click()
        page.locator("#candidates").fill("4")
        generate_example(page, 2, seed=21)
        page.locator(".card.done").wait_for()
        for language, form in zip(("ko", "en"), forms, strict=True):
            page.locator("#board").scroll_into_view_if_needed()
            page.mouse.move(1, 1)
            shots = [form, page.screenshot()]
            page.locator("#generations [data-action=open-0]").click()
            shots.append(page.screenshot())
            page.keyboard.press("Escape")
            page.locator("#language-button").click()
            write(side_by_side(shots), out / f"phone-{language}.png")


def photograph_sheets(browser: Browser, address: str, out: Path) -> None:
    """One caption over colours and categories, and a list of captions: in both languages, on a desktop and on a phone."""
    lists = {
        "ko": (
            "상의에서 색상은 레드이다. 상의에서 카테고리는 티셔츠이다.",
            "하의에서 기장은 발목이다. 하의에서 색상은 블루이다.",
        ),
        "en": (
            "원피스에서 기장은 미니이다. 원피스에서 색상은 블랙이다.",
            "아우터에서 색상은 네이비이다. 아우터에서 카테고리는 점퍼이다.",
        ),
    }
    for language, lines in lists.items():
        with opened(browser, address, _DESKTOP, scheme="light", language=language) as page:
            choose_grid(page)
            save_both(page, out, f"grid-form-{language}", "#several")
            page.locator("#several-make").click()
            page.locator(".sheet .cell.done").nth(11).wait_for()
            save_both(page, out, f"grid-{language}", "#board")
            with page.expect_download() as coming:
                page.locator("[data-action=sheet-download]").click()
            write(Image.open(coming.value.path()), out / f"grid-sheet-{language}.png")
            page.locator("[data-cell='1'] button").click()
            page.locator("[data-action=variations]").click()
            page.locator("input[name=editor-kind][value=strength]").check(force=True)
            page.locator("#only-changed").check()
            save_both(page, out, f"strength-{language}", "#editor-strength")
            page.locator("#editor header button").click()
            page.locator("#several-kind-list").check(force=True)
            page.locator("#several-lines").fill("\n".join(lines))
            page.locator("#n").fill("2")
            page.locator("#several-make").click()
            page.locator(".sheet-list .cell.done").nth(1).wait_for()
            save_both(page, out, f"list-{language}", "#board")


def save_both(page: Page, out: Path, name: str, part: str) -> None:
    """The page on a desktop and on a phone, scrolled to `part`."""
    for device, size in {"desktop": _DESKTOP, "phone": _PHONE}.items():
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.locator(part).evaluate("part => part.scrollIntoView()")
        page.mouse.move(1, 1)
        page.wait_for_timeout(300)  # milliseconds: transitions
        write(Image.open(io.BytesIO(page.screenshot())), out / f"{name}-{device}.png")
    page.set_viewport_size({"width": _DESKTOP[0], "height": _DESKTOP[1]})


SHOTS = {
    "desktop": photograph_desktop,
    "dark": photograph_dark,
    "words": photograph_words,
    "keeping": photograph_keeping,
    "phone": photograph_phone,
    "sheets": photograph_sheets,
}


def choose_grid(page: Page) -> None:
    """Three categories of tops in four colours, of few candidates."""
    page.locator("#caption").fill("상의에서 카테고리는 셔츠이다. 상의에서 소매기장은 긴팔이다.")
    page.locator("#builder").evaluate("fold => (fold.open = false)")
    page.locator("#several").evaluate("fold => (fold.open = true)")
    page.locator("#several-axis-0").select_option("상의/카테고리")
    page.locator("#several-axis-1").select_option("상의/색상")
    for axis, kept in (("카테고리", ["티셔츠", "셔츠", "후드티"]), ("색상", ["블랙", "레드", "네이비", "카키"])):
        page.locator(f"input[id^='several-상의/{axis}-']").evaluate_all(
            "(boxes, kept) => boxes.filter((box) => !kept.includes(box.value)).forEach((box) => box.click())", kept
        )
    page.locator("#candidates").fill("2")
    page.locator("#seed").fill("7")


def generate_example(page: Page, number: int, *, seed: int) -> None:
    # By script: the examples are hidden once there are generations.
    page.locator("#examples button").nth(number).evaluate("button => button.click()")
    page.locator("#seed").fill(str(seed))
    page.locator("#generate").click()


def fill_gallery(page: Page) -> None:
    """Two generations, seen in the gallery. What is shown are the best of few candidates: the gallery is the subject."""
    page.locator("#candidates").fill("4")
    for count, (number, seed) in enumerate(((2, 21), (4, 22)), start=1):
        generate_example(page, number, seed=seed)
        page.locator(".card.done").nth(count - 1).wait_for()
    page.locator("#to-gallery").click()
    page.locator("#gallery-grid li").nth(7).wait_for()


def choose(page: Page, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        page.locator("#gallery-grid [data-action=select]").nth(number).check()


def compare(page: Page, share: int) -> None:
    """The chosen images on top of each other, `share` percent of the left one."""
    page.locator("#selection [data-action=compare]").click()
    page.locator("input[name=compare-view][value=over]").check(force=True)
    page.locator("#compare-border").fill(str(share))
    page.mouse.move(1, 1)


def side_by_side(shots: list[bytes]) -> Image.Image:
    images = [Image.open(io.BytesIO(shot)) for shot in shots]
    gap = 24
    sheet = Image.new("RGB", (sum(each.width + gap for each in images) - gap, images[0].height), "#8a8a8a")
    left = 0
    for each in images:
        sheet.paste(each, (left, 0))
        left += each.width + gap
    return sheet


def paint(page: Page, places: list[tuple[float, float]]) -> None:
    """A stroke along places given as shares of the image's side."""
    box = page.locator("canvas.stage").bounding_box()
    assert box is not None
    for number, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=12)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def save(page: Page, path: Path) -> None:
    settle(page)
    write(Image.open(io.BytesIO(page.screenshot())), path)


def settle(page: Page) -> None:
    """Scrolls the form to its top and moves the pointer away."""
    page.evaluate("() => document.querySelector('#compose').scrollTo(0, 0)")
    page.mouse.move(1, 1)


def write(image: Image.Image, path: Path) -> None:
    image.convert("RGB").save(path, optimize=True)
    print(f"{path} {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
