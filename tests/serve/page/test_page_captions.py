"""What the page composes is what the engine composes, from the attributes and by the form of the served model."""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.data.caption_guide import CaptionGuide, read_guide
from engine.data.kfashion import captions, labels
from engine.data.kfashion.caption_form import kfashion_form
from engine.data.kfashion.labels import Garment, Label
from engine.data.pairs import load_pairs
from serve.api.application import build_api
from serve.settings import ServeSettings
from tests.browser_page import Open, Page, Site, module, needs_chromium, open_page, playwright, stopping
from tests.live_server import INFO, ScriptedPool
from tests.paths import REPOSITORY

expect = playwright.expect
Chosen = dict[str, dict[str, str | list[str]]]


def _random_label(guide: CaptionGuide, generator: random.Random) -> Chosen:
    """One to three garments with any of their attributes, in any order."""
    label: Chosen = {}
    for garment in generator.sample(list(guide.attributes), generator.randint(1, len(guide.attributes))):
        known = {name: values for name, values in guide.attributes[garment].items() if values}
        for name in generator.sample(list(known), generator.randint(1, len(known))):
            several = name in labels.LIST_ATTRIBUTES
            value = generator.sample(known[name], 2) if several else generator.choice(known[name])
            label.setdefault(garment, {})[name] = value
    return label


def _engine_caption(label: Chosen) -> str:
    garments = tuple(Garment(kind, 0, attributes) for kind, attributes in label.items())
    return captions.caption(Label("photo", "", None, None, (), garments))


def _composer(page: Page, guide: CaptionGuide, body: str, argument: Any = None) -> Any:
    """`body` with the page's composer as `m`, the guide's grammar as `grammar` and an argument as `a.argument`."""
    values = {"guide": guide.model_dump(mode="json"), "argument": argument}
    return module(page, "composer", f"const grammar = m.grammarOf(a.guide); {body}", values)


@needs_chromium
def test_any_label_becomes_the_engines_caption_and_comes_back(page: Page, form_guide: CaptionGuide) -> None:
    generator = random.Random(3)
    wanted = [_random_label(form_guide, generator) for _ in range(300)]
    pairs = _composer(
        page,
        form_guide,
        "return a.argument.map((label) => { const text = m.compose(grammar, label); return [text, m.labelOf(grammar, text)]; });",
        wanted,
    )
    for label, (text, back) in zip(wanted, pairs, strict=True):
        assert text == _engine_caption(label)
        assert back == label


@needs_chromium
def test_captions_that_the_form_would_not_write_have_no_label(page: Page, form_guide: CaptionGuide) -> None:
    others = [
        "상의에서 색상는 레드이다.",  # the wrong particle
        "상의에서 카테고리는 후드티이다. 상의에서 색상은 레드이다.",  # another order than the engine's
        "상의에서 색상은 레드이다. 예쁘다.",
        "상의에서 색상은 레드이",
        "상의에서 색상은 노랑이다.",  # no such value
        "원피스에서 색상은 레드이다.",  # no garment that the model knows
        "빨간 후드티",
    ]
    found = _composer(page, form_guide, "return a.argument.map((caption) => m.labelOf(grammar, caption));", others)
    assert found == [None] * len(others)


def _choose(radio: Any) -> None:
    """By its label, as people do: the button itself is out of sight, and a forced click misses it while the page moves."""
    radio.locator("xpath=ancestor::label").click()
    expect(radio).to_be_checked()


@needs_chromium
def test_the_form_writes_the_engines_caption(form_page: Page) -> None:
    page = form_page
    page.locator("#caption").fill("")
    _choose(page.get_by_role("radio", name="후드티"))
    _choose(page.get_by_role("radio", name="레드"))
    page.get_by_label("소매기장").select_option("긴팔")
    for value in ("지퍼", "포켓"):
        page.get_by_label("디테일").select_option(value)
    label: Chosen = {"상의": {"카테고리": "후드티", "색상": "레드", "소매기장": "긴팔", "디테일": ["지퍼", "포켓"]}}
    expect(page.locator("#caption")).to_have_value(_engine_caption(label))
    page.get_by_role("button", name="지퍼 빼기").click()
    _choose(page.get_by_role("radio", name="하의"))
    _choose(page.get_by_role("radio", name="네이비"))
    label["상의"]["디테일"] = ["포켓"]
    label["하의"] = {"색상": "네이비"}
    expect(page.locator("#caption")).to_have_value(_engine_caption(label))
    _choose(page.get_by_role("radio", name="정하지 않음").nth(1))
    expect(page.locator("#caption")).to_have_value(_engine_caption({"상의": label["상의"]}))


@needs_chromium
def test_the_form_edits_its_sentences_and_leaves_own_words_where_they_are(form_page: Page) -> None:
    page = form_page
    caption = page.locator("#caption")
    caption.fill("내가 직접 쓴 설명")
    _choose(page.get_by_role("radio", name="상의"))
    _choose(page.get_by_role("radio", name="셔츠", exact=True))
    expect(caption).to_have_value("내가 직접 쓴 설명 상의에서 카테고리는 셔츠이다.")
    caption.fill("봄옷 상의에서 색상은 블루이다. 산뜻하게")
    expect(page.get_by_role("radio", name="블루", exact=True)).to_be_checked()
    _choose(page.get_by_role("radio", name="그린", exact=True))
    expect(caption).to_have_value("봄옷 상의에서 색상은 그린이다. 산뜻하게")
    _choose(page.get_by_role("radio", name="정하지 않음").nth(1))
    expect(caption).to_have_value("봄옷 산뜻하게")
    _choose(page.get_by_role("radio", name="그린", exact=True))
    page.get_by_role("button", name="고른 것 모두 지우기").click()
    expect(caption).to_have_value("봄옷 산뜻하게")


@needs_chromium
def test_sentences_are_put_at_their_place_and_nothing_else_changes(page: Page, form_guide: CaptionGuide) -> None:
    """Whatever a caption says besides: stating a value and taking it away leaves it as it was."""
    generator = random.Random(5)
    cases = []
    for _ in range(200):
        label = _random_label(form_guide, generator)
        sentences = re.findall(r".*?이다\.", _engine_caption(label))
        for word in generator.sample(["예쁜", "봄 느낌의", "100%", "a shirt"], 2):
            sentences.insert(generator.randint(0, len(sentences)), word)
        stated = [(subject, name) for subject, own in label.items() for name in own]
        subject, name = generator.choice([("상의", "넥라인"), ("하의", "색상"), *stated])
        cases.append({"caption": " ".join(part.strip() for part in sentences), "subject": subject, "attribute": name})
    found = _composer(
        page,
        form_guide,
        """return a.argument.map(({ caption, subject, attribute }) => {
          const before = m.labelIn(grammar, caption);
          const field = grammar.subjects.find(({ name }) => name === subject).fields.find((f) => f.attribute.name === attribute);
          const isList = field.attribute.control === "several";
          const value = isList ? [field.values[0]] : field.values[0];
          const stated = m.withValue(grammar, caption, { subject, attribute, value });
          const without = m.withValue(grammar, stated, { subject, attribute, value: isList ? [] : "" });
          return { before, value, after: m.labelIn(grammar, stated), own: m.ownWords(grammar, stated), ownBefore: m.ownWords(grammar, caption),
            taken: m.labelIn(grammar, without), again: m.withValue(grammar, without, { subject, attribute, value }),
            whole: m.partsOf(grammar, caption).map((part) => part.text).join(" ") };
        });""",
        cases,
    )
    for case, one in zip(cases, found, strict=True):
        subject, name = case["subject"], case["attribute"]
        wanted = {key: dict(own) for key, own in one["before"].items()}
        wanted.setdefault(subject, {})[name] = one["value"]
        assert one["after"] == wanted
        del wanted[subject][name]
        assert {key: own for key, own in one["taken"].items() if own} == {
            key: own for key, own in wanted.items() if own
        }
        assert one["own"] == one["ownBefore"]
        assert one["whole"] == case["caption"]


@needs_chromium
def test_the_form_opens_on_the_subject_that_was_chosen_last(form_page: Page, form_site: Site) -> None:
    page = form_page
    page.locator("#caption").fill(_engine_caption({"상의": {"색상": "레드"}, "하의": {"색상": "블루"}}))
    _choose(page.get_by_role("radio", name="하의"))
    open_page(page, form_site.address)
    expect(page.get_by_role("radio", name="하의")).to_be_checked()
    expect(page.get_by_role("radio", name="블루", exact=True)).to_be_checked()
    page.locator("#caption").fill("")
    _choose(page.get_by_role("radio", name="아우터"))
    open_page(page, form_site.address)
    expect(page.get_by_role("radio", name="아우터")).to_be_checked()


@needs_chromium
def test_readers_of_english_see_what_the_korean_caption_says(form_page: Page) -> None:
    page = form_page
    reading, hint = page.locator("#caption-reading"), page.locator("#caption-language")
    page.locator("#caption").fill("")
    _choose(page.get_by_role("radio", name="후드티"))
    expect(reading).to_be_empty()
    expect(hint).to_be_hidden()
    page.locator("#language-button").click()
    expect(hint).to_contain_text("does not read English")
    _choose(page.get_by_role("radio", name="Red", exact=True))
    expect(page.locator("#caption")).to_have_value("상의에서 색상은 레드이다. 상의에서 카테고리는 후드티이다.")
    expect(reading).to_have_text("Top: Colour Red · Category Hoodie")


@needs_chromium
def test_a_pasted_caption_sets_the_form_and_stays_set_after_a_reload(form_page: Page, form_site: Site) -> None:
    page = form_page
    page.locator("#caption").fill(_engine_caption({"하의": {"기장": "맥시", "색상": "블루", "카테고리": "스커트"}}))
    for _ in range(2):
        expect(page.get_by_role("radio", name="하의")).to_be_checked()
        expect(page.get_by_role("radio", name="블루", exact=True)).to_be_checked()
        expect(page.get_by_label("기장", exact=True)).to_have_value("맥시")
        open_page(page, form_site.address)


@needs_chromium
def test_the_form_offers_what_the_model_knows_in_both_languages(form_page: Page, form_guide: CaptionGuide) -> None:
    page = form_page

    def values(name: str) -> list[str]:
        return page.locator(f"input[name='{name}']").evaluate_all("boxes => boxes.map((box) => box.value)")

    assert values("subject") == ["상의", "하의", "아우터"]  # in the form's order
    assert values("choice-카테고리") == ["", "티셔츠", "후드티", "셔츠", "블라우스", "니트웨어", "탑"]
    assert form_guide.form is not None
    swatches = page.locator(".swatch-choice:has(input:not([value=''])) .swatch")
    shown = swatches.evaluate_all("all => all.map((each) => each.style.getPropertyValue('--swatch'))")
    assert sorted(shown) == sorted(form_guide.form.colours.values())
    page.locator("#language-button").click()
    expect(page.locator("#builder-title")).to_have_text("Compose from garment attributes")
    expect(page.get_by_role("radio", name="Hoodie")).to_have_count(1)
    expect(page.get_by_label("Sleeves").locator("option").nth(1)).to_have_text("Sleeveless")


@needs_chromium
def test_examples_are_the_models_and_named_by_their_values(form_page: Page, form_guide: CaptionGuide) -> None:
    page = form_page
    examples = page.locator("#examples button")
    assert examples.all_inner_texts() == ["화이트 티셔츠", "발목", "예쁜 옷"]
    expect(page.locator("#caption")).to_have_attribute("placeholder", f"예: {form_guide.examples[0]}")
    examples.nth(0).click()
    expect(page.locator("#caption")).to_have_value(form_guide.examples[0])
    page.locator("#language-button").click()
    assert examples.all_inner_texts() == ["White t-shirt", "Ankle", "예쁜 옷"]
    expect(page.locator("#caption")).to_have_attribute("placeholder", f"For example: {form_guide.examples[0]}")


@needs_chromium
def test_a_model_without_a_form_has_examples_from_its_training_and_no_builder(
    page: Page, kodalle_run: Path, pairs_folder: Path
) -> None:
    expect(page.locator("#builder")).to_be_hidden()
    examples = read_guide(kodalle_run / "model").examples
    assert len(examples) == 8
    assert page.locator("#examples button").all_inner_texts() == list(examples[:6])
    trained = {caption for pair in load_pairs(pairs_folder).train for caption in pair.captions}
    assert set(examples) <= trained


@needs_chromium
def test_a_model_without_a_guide_has_neither(open_in: Open) -> None:
    pool = ScriptedPool(info=replace(INFO, caption_guide=CaptionGuide()))
    with stopping(Site(lambda: build_api(pool, ServeSettings()))) as site, open_in(site) as (page, _):
        expect(page.locator("#builder")).to_be_hidden()
        expect(page.locator("#examples button")).to_have_count(0)
        expect(page.locator("#caption")).to_have_attribute("placeholder", "만들고 싶은 이미지를 설명하세요")
        expect(page.locator("#empty-hint")).to_have_text("설명을 써서 시작하세요.")


@needs_chromium
def test_the_form_begins_with_the_models_own_defaults(form_page: Page, form_site: Site) -> None:
    """A choice outlives a reload, the model's own values follow the model, an empty filter is none."""
    page = form_page
    request = "() => import('/page/settings.js').then((m) => m.readSettings())"
    assert {"temperature": 0.7, "topP": 0.9, "topK": None}.items() <= page.evaluate(request).items()
    page.locator("#temperature").evaluate("field => field.closest('details').open = true")
    page.locator("#temperature").fill("1")
    page.locator("#top_p").fill("")
    open_page(page, form_site.address)
    assert {"temperature": 1, "topP": 1}.items() <= page.evaluate(request).items()
    page.locator("#temperature").evaluate("field => field.closest('details').open = true")
    page.locator("#settings-reset").click()
    assert {"temperature": 0.7, "topP": 0.9}.items() <= page.evaluate(request).items()


def test_the_server_and_its_page_know_no_word_of_clothes() -> None:
    """They come with the model: another data set needs no other page."""
    form = kfashion_form()
    words = {*form.subjects, *(each.name for each in form.attributes), *form.colours, "garment", "cloth"}
    for path in sorted((REPOSITORY / "serve").rglob("*.*")):
        if path.suffix in {".py", ".js", ".html", ".css", ".json"}:
            text = path.read_text(encoding="utf-8").replace("models/clothing", "")  # the default model's name
            found = {word for word in words if re.search(rf"(?<!\w){word}", text)}
            assert not found, (path, found)
