"""The page's texts are complete in both languages; its files are small and load nothing from elsewhere."""

import re

from serve.api.page_files import PAGE_FOLDER
from tests.browser_page import Page, module, needs_chromium


@needs_chromium
def test_both_languages_have_every_text_and_the_same_values_in_it(page: Page) -> None:
    tables: dict[str, dict[str, str]] = {
        "ko": module(page, "texts_ko", "return m.korean;"),
        "en": module(page, "texts_en", "return m.english;"),
    }
    assert tables["ko"].keys() == tables["en"].keys()
    for key in tables["ko"]:
        named = {language: set(re.findall(r"\{(\w+)", table[key])) for language, table in tables.items()}
        assert named["ko"] == named["en"], key
    written = "".join(path.read_text(encoding="utf-8") for path in PAGE_FOLDER.rglob("*.js"))
    written += (PAGE_FOLDER / "index.html").read_text(encoding="utf-8")
    used = set(re.findall(r'\bt\(\s*"([\w.]+)"', written)) | set(
        re.findall(r'data-(?:text|label|hint)="([\w.]+)"', written)
    )
    assert used <= tables["ko"].keys()
    # and none is left over: those that are put together from two parts are known by the first
    composed = set(re.findall(r"\bt\(`([\w.]+?)\$\{", written))
    unused = [
        key
        for key in tables["ko"]
        if f'"{key}"' not in written.replace(f'"{key}":', "") and not key.startswith(tuple(composed))
    ]
    assert not unused


def test_the_page_is_small_files_without_anything_from_elsewhere() -> None:
    files = [path for path in PAGE_FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {
        ".html",
        ".css",
        ".js",
        ".json",
        ".svg",
    }  # jsconfig.json is for the type checker
    assert sum(path.stat().st_size for path in files) < 400_000
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}/?", re.sub(r"^\s*(//|/?\*).*$", "", text, flags=re.M)
        ), path
        assert "innerHTML" not in text or path.suffix not in {".js", ".html"}, path
