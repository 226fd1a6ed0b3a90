"""The set of open HTTP requests, so that a stopping server can wait for the ones it has accepted.

A set and not a counter: while the server stops, new requests keep coming and are refused, so a counter might never reach
0.

No torch, no ray.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send


class OpenRequests:
    """ASGI middleware that tracks open requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ended = asyncio.get_running_loop().create_future()
        self._open.add(ended)
        try:
            await self._app(scope, receive, send)
        finally:
            self._open.discard(ended)
            ended.set_result(None)

    async def wait(self) -> None:
        """Returns when every request that is open now has been answered."""
        if self._open:
            await asyncio.wait(set(self._open))
