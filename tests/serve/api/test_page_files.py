from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.api.application import build_api
from serve.api.page_files import add_page
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, serving

FILES = {
    "index.html": "text/html; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "styles/main.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with a page of its own, beside files that must not be served."""
    parent = tmp_path_factory.mktemp("server")
    folder = parent / "page"
    for name in (*FILES, "notes.md", ".hidden", "tool.py", "jsconfig.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"<p>{name}</p>")
    (parent / "secret.js").write_text("{}")
    (folder / "link.js").symlink_to(parent / "secret.js")
    app = build_api(ScriptedPool(), ServeSettings(page=False))
    add_page(app, folder)
    with serving(app) as port:
        yield port


def test_files_have_their_media_types_and_are_revalidated(port: int) -> None:
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
        "notes.md", ".hidden", "tool.py", "jsconfig.json", "nothing.js", "", "styles", "styles/", "../secret.js", "..%2fsecret.js",
        "%2e%2e/secret.js", "link.js", "a%00.js", "%ff.js", "a" * 5000 + ".js", "/etc/passwd.js",
    ],
)  # fmt: skip
def test_no_other_file_is_served(port: int, path: str) -> None:
    reply = ask(port, "GET", f"/page/{path}")
    assert (reply.status, reply.error["code"]) == (404, "not_found")


def test_files_are_read_only(port: int) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert ask(port, method, "/page/main.js").error["code"] == "method_not_allowed"


def test_without_the_pages_folder_the_api_works(tmp_path: Path) -> None:
    app = build_api(ScriptedPool(), ServeSettings(page=False))
    add_page(app, tmp_path / "missing")
    with serving(app) as port:
        assert ask(port, "GET", "/").error["code"] == "not_found"
        assert ask(port, "GET", "/healthz").status == 200


def test_the_real_page_is_served_unless_switched_off() -> None:
    for page, status in ((True, 200), (False, 404)):
        with serving(build_api(ScriptedPool(), ServeSettings(page=page))) as port:
            assert ask(port, "GET", "/").status == status
