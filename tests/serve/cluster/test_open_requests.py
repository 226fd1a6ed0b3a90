"""A server that stops waits for those that it took on, and for nobody who came later."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from serve.cluster.open_requests import OpenRequests


async def nothing() -> Message:
    return {"type": "http.disconnect"}


async def nowhere(message: Message) -> None:
    pass


def test_it_waits_for_what_is_open_and_not_for_what_comes_later() -> None:
    async def run() -> None:
        go_on = {"first": asyncio.Event(), "late": asyncio.Event()}

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on[scope["path"]].wait()
            if scope["path"] == "first":
                raise ConnectionResetError  # however it ends

        requests = OpenRequests(app)
        first = asyncio.create_task(requests({"type": "http", "path": "first"}, nothing, nowhere))
        await asyncio.sleep(0)
        finishing = asyncio.create_task(requests.finish())
        await asyncio.sleep(0)
        late = asyncio.create_task(requests({"type": "http", "path": "late"}, nothing, nowhere))
        await asyncio.sleep(0.02)
        assert not finishing.done(), "the first is still being answered"
        go_on["first"].set()
        await asyncio.wait({finishing}, timeout=5)
        assert finishing.done()
        assert not late.done()
        go_on["late"].set()
        await late
        assert isinstance(first.exception(), ConnectionResetError)
        await asyncio.wait_for(requests.finish(), 1)  # nothing is open

    asyncio.run(run())


def test_what_is_no_request_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(OpenRequests(app)({"type": "lifespan"}, nothing, nowhere))
    assert seen == ["lifespan"]
