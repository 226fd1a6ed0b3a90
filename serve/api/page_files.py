"""Static files of the designers' page: `/` is serve/page/index.html, all other files are under /page/.

They are read once and served from memory: a client that reads slowly holds no open file and no copy of its own.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

PAGE_FOLDER = Path(__file__).parents[1] / "page"
# Explicit, because some systems' own tables map .js to text/plain, which browsers refuse to run. Other suffixes are not
# served.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Browsers cache the files and revalidate them each time, so an update is visible at once.
_CACHE_CONTROL = "no-cache"


@dataclass(frozen=True)
class _PageFile:
    content: bytes
    headers: dict[str, str]

    def response(self, request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.headers["etag"] in known or "*" in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def add_page(app: FastAPI, folder: Path = PAGE_FOLDER) -> None:
    """Adds the page's routes; without its folder `/` is a 404 and the API works."""
    if not folder.is_dir():
        return
    files = dict(_read(folder))

    async def page_file(request: Request, path: str = "index.html") -> Response:
        if path not in files:
            raise HTTPException(status_code=404)
        return files[path].response(request)

    async def index(request: Request) -> Response:
        return await page_file(request)

    for route, endpoint in (("/", index), ("/page/{path:path}", page_file)):
        app.add_api_route(route, endpoint, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)


def _read(folder: Path) -> Iterator[tuple[str, _PageFile]]:
    """The folder's files of the page's types by their paths within it; links may point anywhere and are left out."""
    for path in sorted(folder.rglob("*")):
        media_type = _MEDIA_TYPES.get(path.suffix)
        if media_type is None or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"content-type": media_type, "cache-control": _CACHE_CONTROL, "etag": etag}
        yield path.relative_to(folder).as_posix(), _PageFile(content, headers)
