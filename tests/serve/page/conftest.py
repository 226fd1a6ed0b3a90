"""One browser and one server for all tests of the page; servers of other settings where a test needs them."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.caption_guide import CaptionGuide, write_guide
from engine.data.kfashion import labels
from engine.data.kfashion.caption_form import kfashion_form
from serve.api.application import build_api
from serve.local_pool import LocalPool
from serve.settings import ServeSettings
from serve.worker.decode_loop import DecodeLoop
from tests.browser_page import (
    WAIT_MS,
    MakeSite,
    MakeSlow,
    Open,
    Page,
    Site,
    StepGate,
    chromium,
    model_site,
    opened,
    playwright,
)

playwright.expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
def served(kodalle_run: Path) -> Iterator[tuple[Site, LocalPool]]:
    with model_site(kodalle_run / "model") as served:
        yield served


@pytest.fixture(scope="package")
def site(served: tuple[Site, LocalPool]) -> Site:
    return served[0]


@pytest.fixture(scope="package")
def form_guide() -> CaptionGuide:
    """Of a model that knows tops, bottoms and outerwear with all their attributes, but no bra tops."""
    attributes = {
        garment: {
            name: sorted((labels.vocabulary(garment, name) or frozenset()) - {"브라탑"}) for name in labels.ATTRIBUTES
        }
        for garment in ("상의", "하의", "아우터")
    }
    captions = ("상의에서 색상은 화이트이다. 상의에서 카테고리는 티셔츠이다.", "하의에서 기장은 발목이다.", "예쁜 옷")
    return CaptionGuide(examples=captions, attributes=attributes, form=kfashion_form())


@pytest.fixture(scope="package")
def form_site(kodalle_run: Path, form_guide: CaptionGuide, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A model with `form_guide` and defaults of its own: its page has a form for attributes."""
    model = tmp_path_factory.mktemp("form") / "model"
    shutil.copytree(kodalle_run / "model", model)
    write_guide(model, form_guide)
    (model / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9}')
    with model_site(model) as (site, _):
        yield site


@pytest.fixture(scope="package")
def open_in(browser: Any) -> Open:
    """`open_in(site)`: the page of that server in a new context."""
    return lambda site, **options: opened(browser, site.address, **options)


@pytest.fixture
def page(open_in: Open, site: Site) -> Iterator[Page]:
    with open_in(site) as (page, _):
        yield page


@pytest.fixture
def form_page(open_in: Open, form_site: Site) -> Iterator[Page]:
    with open_in(form_site) as (page, _):
        yield page


@pytest.fixture
def site_with(kodalle_run: Path, served: tuple[Site, LocalPool]) -> Iterator[MakeSite]:
    """`site_with(keys_file=…)`: the same worker behind an API server with other settings."""
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> Site:
            settings = ServeSettings(model=str(kodalle_run / "model")).model_copy(update=changes)
            site = Site(lambda: build_api(served[1], settings))
            stack.callback(site.stop)
            return site

        yield make


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepGate]:
    """Holds every worker that is started after it before its first step."""
    gate = StepGate()
    pace = DecodeLoop._pace

    def held(decode_loop: DecodeLoop) -> None:
        gate.wait()
        pace(decode_loop)

    monkeypatch.setattr(DecodeLoop, "_pace", held)
    yield gate
    gate.open()


@pytest.fixture
def slow_site(kodalle_run: Path, gate: StepGate) -> Iterator[MakeSlow]:
    """`slow_site(max_queued_sequences=…)`: one slot, unless the test wants more, and no step without leave of `gate`."""
    with contextlib.ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            # the steps last as long as the test likes: no promise of a deadline can follow from them
            model_site(kodalle_run / "model", **({"num_slots": 1, "deadline_s": 1e9} | changes))
        )
        gate.open()  # closing a worker waits for its step
