"""The designers' page in real headless Chromium, served by the real edge and worker: what the page's tests share."""

import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from serve.api.application import build_api
from serve.api.listener import listener
from serve.local_pool import LocalPool
from serve.settings import ServeSettings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")

CHROMIUM = "/usr/bin/chromium"
needs_chromium = pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"no {CHROMIUM}: apt install chromium")
_ARGUMENTS = (
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_WAIT_MS = 20_000
# What a browser writes by itself about an answer that is no success, or none at all.
_ABOUT_ANSWERS = re.compile(r"^Failed to load resource: ")

Page = Any  # playwright ships types, but is no dependency of those who only read this


class Site:
    """An application on a port of its own that it keeps over `stop` and `start`."""

    def __init__(self, make_app: Callable[[], FastAPI]) -> None:
        self._make_app = make_app
        self._thread: threading.Thread | None = None
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        listening.listen(128)
        self.port = listening.getsockname()[1]
        self._server = listener(self._make_app(), host="127.0.0.1", port=self.port, drain_s=0)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it as a crash would: answers that are under way break off."""
        self._server.force_exit = True
        self._server.should_exit = True
        assert self._thread is not None
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()

    def post(self, path: str, values: dict[str, Any]) -> Any:
        """What a program gets from the same server."""
        data = json.dumps(values).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def model_site(model: Path, **changes: Any) -> Iterator[tuple[Site, LocalPool]]:
    """A model folder under the real edge and worker; `changes` to the settings."""
    settings = ServeSettings(model=str(model)).model_copy(update={"num_slots": 8} | changes)
    pool = LocalPool(settings)
    site = Site(lambda: build_api(pool, settings))
    try:
        yield site, pool
    finally:
        site.stop()
        pool.close()


@dataclass
class Complaints:
    """What a page must never do, and did."""

    told: list[str] = field(default_factory=list)
    may_fail: bool = False  # the test breaks connections, or is refused, on purpose

    def note(self, kind: str, text: str) -> None:
        if not (self.may_fail and _ABOUT_ANSWERS.match(text)):
            self.told.append(f"{kind}: {text}")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a new profile, which is deleted with it."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, address: str, *, start: bool = True, **options: Any) -> Iterator[tuple[Page, Complaints]]:
    """The page in a context without history; after it, the page must have had no error and asked nobody else.

    `start`: False leaves the opening to the test. `options`: of the browser's context.
    """
    complaints = Complaints()
    context = browser.new_context(**({"locale": "ko-KR", "viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(_WAIT_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.note("exception", str(error)))
    page.on("console", lambda said: complaints.note("console", said.text) if said.type == "error" else None)
    page.on("request", lambda asked: _note_foreign(asked.url, address, complaints))
    try:
        if start:
            open_page(page, address)
        yield page, complaints
    finally:
        context.close()
    assert not complaints.told, f"complaints: {complaints.told}"


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    page.locator("#model-info", has_text="32").wait_for()  # the last thing that starting does


def _note_foreign(url: str, address: str, complaints: Complaints) -> None:
    if not url.startswith((f"{address}/", "blob:", "data:")):
        complaints.note("foreign request", url)


def module(page: Page, name: str, body: str, argument: Any = None) -> Any:
    """Runs `body`, which sees the page's module `name` as `m` and `argument` as `a`, in the page."""
    return page.evaluate(f"async (a) => {{ const m = await import('/page/{name}.js'); {body} }}", argument)


def fill(page: Page, caption: str, *, n: int = 2, candidates: int = 4, seed: str = "7") -> None:
    """Fills the form as a person would."""
    for name, value in (("caption", caption), ("n", n), ("candidates", candidates), ("seed", seed)):
        page.locator(f"#{name}").fill(str(value))


def draw(page: Page, caption: str, *, n: int = 2, candidates: int = 4, seed: str = "7") -> None:
    fill(page, caption, n=n, candidates=candidates, seed=seed)
    page.locator("#draw").click()


def wait_done(page: Page, count: int = 1, *, timeout_s: float = 20) -> None:
    page.locator(".card.done").nth(count - 1).wait_for(timeout=timeout_s * 1000)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for it. The minute ends a test that fails; no test passes or fails by a machine's speed."""
    ends = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


def pixels(picture: bytes) -> NDArray[np.uint8]:
    """(S, S, 3) of a file's content."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def downloaded(page: Page, press: Callable[[], None]) -> tuple[str, bytes]:
    """Name and content of the file that `press` downloads."""
    with page.expect_download() as coming:
        press()
    return coming.value.suggested_filename, coming.value.path().read_bytes()
