"""Which requests are being answered, so that a server that stops can wait for those that it took on.

Not a count: while it stops, clients go on asking and are refused, so that a busy server's count is never 0.

No torch, no ray.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send


class OpenRequests:
    """ASGI middleware."""

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

    async def finish(self) -> None:
        """Returns when all requests that are open now have been answered."""
        if self._open:
            await asyncio.wait(set(self._open))
