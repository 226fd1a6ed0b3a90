"""Static files of the designers' page: `/` is serve/page/index.html, all other files are under /page/."""

from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

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


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        media_type = _MEDIA_TYPES.get(Path(path).suffix.lower())
        if media_type is None:
            raise HTTPException(status_code=404)
        response = await super().get_response(path, scope)
        if response.status_code == 200:
            response.headers["content-type"] = media_type
        response.headers["cache-control"] = _CACHE_CONTROL
        return response


def add_page(app: FastAPI, folder: Path = PAGE_FOLDER) -> None:
    """Adds the page's routes; without its folder `/` is a 404 and the API works."""
    if not folder.is_dir():
        return
    files = _PageFiles(directory=folder)

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    app.mount("/page", files)
