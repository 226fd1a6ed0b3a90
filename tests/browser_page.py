"""The designers' page in headless Chromium, served by the real API server and worker: what the page's tests share."""

import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
# The longest wait for anything: it ends a test that fails, and no test passes or fails by a machine's speed.
WAIT_MS = 60_000
# What the browser itself logs about a response that is no success, or none at all.
_ABOUT_RESPONSES = re.compile(r"^Failed to load resource: ")

CAPTION = "빨강 바탕에 파랑 네모"
Page = Any  # playwright has types, but is not always installed


class Site:
    """An application on a port of its own, which stays the same over `stop` and `start`."""

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
        """Ends it as a crash would: responses break off."""
        self._server.force_exit = True
        self._server.should_exit = True
        assert self._thread is not None
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()

    def post(self, path: str, values: dict[str, Any]) -> Any:
        """The JSON answer that a program gets from the same server."""
        data = json.dumps(values).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def model_site(model: Path, **changes: Any) -> Iterator[tuple[Site, LocalPool]]:
    """A model folder behind the real API server and worker, with `changes` to the settings."""
    settings = ServeSettings(model=str(model)).model_copy(update={"num_slots": 8} | changes)
    pool = LocalPool(settings)
    site = Site(lambda: build_api(pool, settings))
    try:
        yield site, pool
    finally:
        site.stop()
        pool.close()


@contextmanager
def stopping(site: Site) -> Iterator[Site]:
    try:
        yield site
    finally:
        site.stop()


@dataclass
class Complaints:
    """Errors and foreign requests of a page."""

    noted: list[str] = field(default_factory=list)
    may_fail: bool = False  # the test breaks connections, or is refused, on purpose

    def note(self, kind: str, text: str) -> None:
        if not (self.may_fail and _ABOUT_RESPONSES.match(text)):
            self.noted.append(f"{kind}: {text}")


Open = Callable[..., AbstractContextManager[tuple[Page, Complaints]]]
MakeSite = Callable[..., Site]
MakeSlow = Callable[..., tuple[Site, LocalPool]]


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
    """The page in a new context; at the end it must have had no error and no request to another site.

    Args:
        start: False leaves the opening to the test.
        options: of the browser's context.
    """
    complaints = Complaints()
    context = browser.new_context(**({"locale": "ko-KR", "viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.note("exception", str(error)))
    page.on("console", lambda line: complaints.note("console", line.text) if line.type == "error" else None)
    page.on("request", lambda request: _note_foreign(request.url, address, complaints))
    try:
        if start:
            open_page(page, address)
        yield page, complaints
    finally:
        context.close()
    assert not complaints.noted, f"complaints: {complaints.noted}"


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    page.locator("#model-info", has_text="32").wait_for()  # the last step of its start


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


def generate(page: Page, caption: str, *, n: int = 2, candidates: int = 4, seed: str = "7") -> None:
    fill(page, caption, n=n, candidates=candidates, seed=seed)
    page.locator("#generate").click()


def wait_done(page: Page, count: int = 1) -> None:
    page.locator(".card.done").nth(count - 1).wait_for()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for it. The minute ends a test that fails; no test passes or fails by a machine's speed."""
    ends = time.monotonic() + WAIT_MS / 1000
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


def pixels(image: bytes) -> NDArray[np.uint8]:
    """(S, S, 3) of a file's content."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def downloaded(page: Page, press: Callable[[], None]) -> tuple[str, bytes]:
    """Name and content of the file that `press` downloads."""
    with page.expect_download() as coming:
        press()
    return coming.value.suggested_filename, coming.value.path().read_bytes()


class StepGate:
    """Lets decoding steps through one by one, so that a test and not the machine's speed decides how far they are."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._is_open = True

    def wait(self) -> None:
        while not self._is_open and not self._permits.acquire(timeout=0.01):
            pass
