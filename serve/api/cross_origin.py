"""Browser apps on other origins: CORS headers for the origins that the settings list, nothing for all others.

A request of a listed origin passes Starlette's CORSMiddleware, which answers preflights, without a key because browsers send
none with them, and adds its headers to every other reply, errors too: without them an app could not read why it was refused.
No cookies take part, so credentials are not allowed; a key in `Authorization` is a header like any other.

No torch, no ray.
"""

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

_READABLE_HEADERS = ("x-request-id", "retry-after", "x-should-retry")
_PREFLIGHT_TTL_S = 600


class CrossOrigin:
    """ASGI middleware around whatever answers and refuses requests; it only acts on requests of listed origins."""

    def __init__(self, app: ASGIApp, *, origins: Iterable[str]) -> None:
        self._app, self._origins = app, frozenset(origins)
        self._listed = CORSMiddleware(
            app,
            allow_origins=tuple(self._origins),
            allow_methods=["*"],  # of the preflight alone: a path that lacks the method answers so itself
            allow_headers=["*"],  # OpenAI's clients add a dozen of their own
            allow_private_network=True,  # a listed app on the web may call a server on this machine or network
            expose_headers=_READABLE_HEADERS,
            max_age=_PREFLIGHT_TTL_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_listed = scope["type"] == "http" and origin_of(Headers(scope=scope)) in self._origins
        await (self._listed if is_listed else self._app)(scope, receive, send)


def origin_of(headers: Headers) -> str | None:
    """The one Origin header of a request; None without one or with several, which no browser sends."""
    origins = headers.getlist("origin")
    return origins[0] if len(origins) == 1 else None
