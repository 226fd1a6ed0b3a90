from pathlib import Path

import pytest
from fastapi import FastAPI

from serve.api import page_files
from serve.api.application import build_api
from serve.api.page_files import add_page
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, serving

FILES = {
    "index.html": "text/html; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "styles/main.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "attributes.json": "application/json",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "page"
    for name in (*FILES, "notes.md", ".hidden", "tool.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<p>{name}</p>")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    monkeypatch.setattr(page_files, "PAGE_FOLDER", folder)
    return folder


@pytest.fixture
def app(folder: Path) -> FastAPI:
    app = build_api(ScriptedPool(), ServeSettings(page=False))
    add_page(app, folder)
    return app


def test_files_have_their_types_and_are_asked_for_again_each_time(app: FastAPI) -> None:
    with serving(app) as port:
        for name, media_type in FILES.items():
            reply = ask(port, "GET", f"/page/{name}")
            assert (reply.status, reply.headers["content-type"]) == (200, media_type)
            assert reply.headers["cache-control"] == "no-cache"
            assert reply.headers["content-security-policy"]
            again = ask(port, "GET", f"/page/{name}", headers={"if-none-match": reply.headers["etag"]})
            assert (again.status, again.body) == (304, b"")
        index = ask(port, "GET", "/")
        assert index.body == b"<p>index.html</p>"
        assert index.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "path",
    [
        "notes.md", ".hidden", "tool.py", "nothing.js", "", "styles", "styles/", "../secret.json", "..%2fsecret.json",
        "%2e%2e/secret.json", "link.json", "a%00.js", "%ff.js", "a" * 5000 + ".js", "/etc/passwd.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(app: FastAPI, path: str) -> None:
    with serving(app) as port:
        reply = ask(port, "GET", f"/page/{path}")
        assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_files_are_read_only(app: FastAPI) -> None:
    with serving(app) as port:
        for method in ("POST", "PUT", "DELETE"):
            assert ask(port, method, "/page/main.js").error["code"] == "method_not_allowed"


def test_without_its_folder_the_api_works(tmp_path: Path) -> None:
    app = build_api(ScriptedPool(), ServeSettings(page=False))
    add_page(app, tmp_path / "missing")
    with serving(app) as port:
        assert ask(port, "GET", "/").error["code"] == "not_found"
        assert ask(port, "GET", "/healthz").status == 200


def test_the_real_page_is_served_unless_switched_off() -> None:
    for page, status in ((True, 200), (False, 404)):
        with serving(build_api(ScriptedPool(), ServeSettings(page=page))) as port:
            assert ask(port, "GET", "/").status == status
