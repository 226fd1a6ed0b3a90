"""An edge's way to the workers where some of them never answer: no host is needed to be cut off for that."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve import app
from serve.api.errors import Failure
from serve.app import RayPool
from serve.messages import ModelInfo
from tests.live_server import INFO


class _Handle:
    """Stands for a deployment handle: `info` answers as told."""

    def __init__(self, answer: Callable[[], Awaitable[ModelInfo]]) -> None:
        self._answer = answer
        self.num_asked = 0
        self.info = self

    def options(self, **_: Any) -> "_Handle":
        return self

    def remote(self) -> Awaitable[ModelInfo]:
        self.num_asked += 1
        return self._answer()


async def _answers() -> ModelInfo:
    return INFO


async def _is_silent() -> ModelInfo:
    await asyncio.Event().wait()
    raise AssertionError


def _pool(handle: _Handle) -> RayPool:
    return RayPool(handle, handle, api_server_name="edge-test")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ASK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(app, "_INFO_KEPT_S", 0.05)


def test_a_worker_that_was_cut_off_holds_nobody_up() -> None:
    async def ask() -> tuple[list[ModelInfo], int]:
        handle = _Handle(_answers)
        pool = _pool(handle)
        await pool.model_info()
        handle._answer, handle.num_asked = _is_silent, 0
        await asyncio.sleep(0.06)
        told = await asyncio.gather(*(pool.model_info() for _ in range(20)))
        return list(told), handle.num_asked

    told, num_asked = asyncio.run(asyncio.wait_for(ask(), 10))
    assert told == [INFO] * 20
    assert num_asked == 1, "the others go on with what is known"


def test_the_first_question_is_asked_again() -> None:
    async def ask() -> ModelInfo:
        handle = _Handle(_is_silent)
        asking = asyncio.create_task(_pool(handle).model_info())
        await asyncio.sleep(0.15)
        handle._answer = _answers
        return await asking

    assert asyncio.run(asyncio.wait_for(ask(), 10)) == INFO


def test_where_nobody_ever_answers_the_client_may_ask_again() -> None:
    with pytest.raises(Failure) as refused:
        asyncio.run(asyncio.wait_for(_pool(_Handle(_is_silent)).model_info(), 10))
    assert (refused.value.status, refused.value.code) == (503, "unavailable")
    assert refused.value.headers["retry-after"] == "1"
