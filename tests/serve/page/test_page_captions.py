"""What the page composes is what the engine composes; its words are whole in both languages."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.kfashion import captions, labels
from engine.data.kfashion.colours import K_FASHION_COLOURS
from engine.data.kfashion.labels import Garment, Label
from serve.api.page_files import PAGE_FOLDER
from tests.browser_page import Page, chromium, model_site, module, needs_chromium, opened, playwright

expect = playwright.expect
GRAMMAR = json.loads((PAGE_FOLDER / "attributes.json").read_text(encoding="utf-8"))
Chosen = dict[str, dict[str, str | list[str]]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Any, kodalle_run: Path) -> Iterator[Page]:
    with model_site(kodalle_run / "model") as (site, _), opened(browser, site.address) as (page, _):
        yield page


def _random_label(generator: random.Random) -> Chosen:
    """One to four parts with any of their attributes, in any order."""
    label: Chosen = {}
    for part in generator.sample(GRAMMAR["parts"], generator.randint(1, 4)):
        names = generator.sample(list(part["attributes"]), generator.randint(1, len(part["attributes"])))
        for name in names:
            words = [each["value"] for each in GRAMMAR["values"][part["attributes"][name]]]
            several = name in labels.LIST_ATTRIBUTES
            value = generator.sample(words, generator.randint(1, 3)) if several else generator.choice(words)
            label.setdefault(part["name"], {})[name] = value
    return label


def _engine_caption(label: Chosen) -> str:
    garments = tuple(Garment(kind, 0, attributes) for kind, attributes in label.items())
    return captions.caption(Label("photo", "", None, None, (), garments))


def test_the_attributes_are_those_of_the_labels() -> None:
    assert [part["name"] for part in GRAMMAR["parts"]] == list(labels.GARMENT_TYPES)
    assert sorted(GRAMMAR["shown_order"]) == sorted(labels.GARMENT_TYPES)
    assert [each["name"] for each in GRAMMAR["attributes"]] == list(labels.ATTRIBUTES)
    for each in GRAMMAR["attributes"]:
        assert each["particle"] == captions.particle(each["name"])
        assert (each["control"] == "several") == (each["name"] in labels.LIST_ATTRIBUTES)
    for part in GRAMMAR["parts"]:
        for name, values in part["attributes"].items():
            words = [each["value"] for each in GRAMMAR["values"][values]]
            assert len(words) == len(set(words))
            assert set(words) == labels.vocabulary(part["name"], name), (part["name"], name)
    for values in GRAMMAR["values"].values():
        assert all(each["en"].isascii() for each in values)
    swatches = {each["value"]: each["swatch"] for each in GRAMMAR["values"]["colours"]}
    assert swatches == {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in K_FASHION_COLOURS.items()}


@needs_chromium
def test_any_label_becomes_the_engines_caption_and_comes_back(page: Page) -> None:
    generator = random.Random(3)
    wanted = [_random_label(generator) for _ in range(300)] + [each["label"] for each in GRAMMAR["examples"]]
    pairs = module(
        page,
        "composer",
        "return a.labels.map((label) => { const text = m.compose(a.grammar, label); return [text, m.labelOf(a.grammar, text)]; });",
        {"labels": wanted, "grammar": GRAMMAR},
    )
    for label, (text, back) in zip(wanted, pairs, strict=True):
        assert text == _engine_caption(label)
        assert back == label


@needs_chromium
@pytest.mark.parametrize(
    "caption",
    [
        "상의에서 색상는 레드이다.",  # the wrong particle
        "상의에서 카테고리는 후드티이다. 상의에서 색상은 레드이다.",  # another order than the engine's
        "상의에서 색상은 레드이다. 예쁘다.",
        "상의에서 색상은 레드이",
        "상의에서 색상은 노랑이다.",  # no such value
        "빨간 후드티",
    ],
)
def test_what_the_builder_would_not_write_is_left_alone(page: Page, caption: str) -> None:
    assert (
        module(page, "composer", "return m.labelOf(a.grammar, a.caption);", {"grammar": GRAMMAR, "caption": caption})
        is None
    )


@needs_chromium
def test_pressing_through_the_builder_writes_the_engines_caption(page: Page) -> None:
    page.locator("#caption").fill("")
    page.get_by_role("radio", name="후드티").check(force=True)
    page.get_by_role("radio", name="레드").check(force=True)
    page.get_by_label("소매기장").select_option("긴팔")
    for value in ("지퍼", "포켓"):
        page.get_by_label("디테일").select_option(value)
    label: Chosen = {"상의": {"카테고리": "후드티", "색상": "레드", "소매기장": "긴팔", "디테일": ["지퍼", "포켓"]}}
    expect(page.locator("#caption")).to_have_value(_engine_caption(label))
    page.get_by_role("button", name="지퍼 빼기").click()
    page.get_by_role("radio", name="하의").check(force=True)
    page.get_by_role("radio", name="네이비").check(force=True)
    label["상의"]["디테일"] = ["포켓"]
    label["하의"] = {"색상": "네이비"}
    expect(page.locator("#caption")).to_have_value(_engine_caption(label))
    page.get_by_role("radio", name="정하지 않음").nth(1).check(force=True)
    expect(page.locator("#caption")).to_have_value(_engine_caption({"상의": label["상의"]}))


@needs_chromium
def test_ones_own_words_are_never_overwritten(page: Page) -> None:
    page.locator("#caption").fill("내가 직접 쓴 설명")
    page.get_by_role("radio", name="상의").check(force=True)
    page.get_by_role("radio", name="셔츠", exact=True).check(force=True)
    expect(page.locator("#caption")).to_have_value("내가 직접 쓴 설명")
    expect(page.locator("#builder-offer .composed")).to_contain_text("상의에서 카테고리는 셔츠이다.")
    page.get_by_role("button", name="이 설명으로 바꾸기").click()
    expect(page.locator("#caption")).to_have_value(re.compile("^상의에서 .*카테고리는 셔츠이다"))


@needs_chromium
def test_a_caption_that_is_pasted_sets_the_builder(page: Page) -> None:
    label = GRAMMAR["examples"][1]["label"]
    page.locator("#caption").fill(_engine_caption(label))
    expect(page.get_by_role("radio", name="원피스")).to_be_checked()
    expect(page.get_by_role("radio", name="블루", exact=True)).to_be_checked()
    expect(page.get_by_label("기장", exact=True)).to_have_value(label["원피스"]["기장"])


KNOWN = {
    "상의": {
        "색상": ["화이트", "블랙", "레드"],
        "서브색상": ["블랙"],
        "카테고리": ["티셔츠", "셔츠"],
        "핏": ["없는 핏"],
    },
    "하의": {"색상": ["네이비", "블랙"], "카테고리": ["팬츠"], "기장": ["발목", "미니"]},
}


@pytest.fixture
def knowing_page(browser: Any, kodalle_run: Path, tmp_path: Path) -> Iterator[Page]:
    """Of a model that says what its captions told of, and how it is drawn with."""
    model = tmp_path / "model"
    shutil.copytree(kodalle_run / "model", model)
    (model / "attributes.json").write_text(json.dumps(KNOWN), encoding="utf-8")
    (model / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9}')
    with model_site(model) as (site, _), opened(browser, site.address) as (page, _):
        expect(page.locator("#temperature")).to_have_value("0.7")
        yield page


@needs_chromium
def test_what_the_model_has_not_learnt_is_not_offered(knowing_page: Page) -> None:
    page = knowing_page

    def values(name: str) -> list[str]:
        return page.locator(f"input[name='{name}']").evaluate_all("boxes => boxes.map((box) => box.value)")

    assert values("part") == ["상의", "하의"]
    assert sorted(values("choice-색상")) == ["", "레드", "블랙", "화이트"]
    assert sorted(values("choice-카테고리")) == ["", "셔츠", "티셔츠"]
    expect(page.get_by_label("핏", exact=True)).to_have_count(0)  # no word of it is the page's
    examples = page.locator("#examples button")
    assert examples.all_inner_texts() == ["화이트 티셔츠", "블랙 팬츠"]
    examples.nth(0).click()
    expect(page.locator("#caption")).to_have_value(_engine_caption({"상의": {"색상": "화이트", "카테고리": "티셔츠"}}))
    examples.nth(1).click()
    expect(page.locator("#caption")).to_have_value(
        _engine_caption({"하의": {"색상": "블랙", "카테고리": "팬츠", "기장": "발목"}})
    )
    assert values("choice-색상") == ["", "블랙", "네이비"]
    # A caption with other words is read as ever.
    page.locator("#caption").fill(_engine_caption({"원피스": {"색상": "레드"}, "상의": {"색상": "레드"}}))
    expect(page.locator("input[name='choice-색상'][value='레드']")).to_be_checked()
    page.locator("#caption").fill(_engine_caption({"원피스": {"색상": "레드"}}))
    assert values("part") == ["상의", "하의"]


@needs_chromium
def test_the_form_begins_with_the_models_own_options(knowing_page: Page) -> None:
    """A choice outlives a reload, the model's own values follow the model, an empty filter is none."""
    page = knowing_page
    request = "() => import('/page/settings.js').then((m) => m.readSettings())"
    assert {"temperature": 0.7, "topP": 0.9, "topK": None}.items() <= page.evaluate(request).items()
    page.locator("#temperature").evaluate("field => field.closest('details').open = true")
    page.locator("#temperature").fill("1")
    page.locator("#top_p").fill("")
    page.reload()
    expect(page.locator("#examples button")).to_have_count(2)
    assert {"temperature": 1, "topP": 1}.items() <= page.evaluate(request).items()
    page.locator("#temperature").evaluate("field => field.closest('details').open = true")
    page.locator("#settings-reset").click()
    assert {"temperature": 0.7, "topP": 0.9}.items() <= page.evaluate(request).items()


@needs_chromium
def test_models_that_say_nothing_or_other_things_are_offered_everything(page: Page) -> None:
    for known in ({}, {"landscape": {"weather": ["rain"]}}):
        offered = module(
            page, "composer", "return m.offeredTo(a.grammar, a.known);", {"grammar": GRAMMAR, "known": known}
        )
        assert offered == GRAMMAR


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
    assert {path.suffix for path in files} == {".html", ".css", ".js", ".json", ".svg"}
    assert sum(path.stat().st_size for path in files) < 250_000
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}/?", re.sub(r"^\s*(//|/?\*).*$", "", text, flags=re.M)
        ), path
        assert "innerHTML" not in text or path.suffix not in {".js", ".html"}, path
