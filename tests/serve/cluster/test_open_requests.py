"""A stopping server waits for the requests that are open, and not for later ones."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from serve.cluster.open_requests import OpenRequests


async def nothing() -> Message:
    return {"type": "http.disconnect"}


async def nowhere(message: Message) -> None:
    pass


def test_it_waits_for_open_requests_and_not_for_later_ones() -> None:
    async def run() -> None:
        finish = {"first": asyncio.Event(), "late": asyncio.Event()}

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await finish[scope["path"]].wait()
            if scope["path"] == "first":
                raise ConnectionResetError  # an error ends a request, too

        requests = OpenRequests(app)
        first = asyncio.create_task(requests({"type": "http", "path": "first"}, nothing, nowhere))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(requests.wait())
        await asyncio.sleep(0)
        late = asyncio.create_task(requests({"type": "http", "path": "late"}, nothing, nowhere))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done(), "the first request is still open"
        finish["first"].set()
        await asyncio.wait({waiting}, timeout=5)
        assert waiting.done()
        assert not late.done()
        finish["late"].set()
        await late
        assert isinstance(first.exception(), ConnectionResetError)
        await asyncio.wait_for(requests.wait(), 5)  # none is open

    asyncio.run(run())


def test_other_scopes_pass_through() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(OpenRequests(app)({"type": "lifespan"}, nothing, nowhere))
    assert seen == ["lifespan"]
