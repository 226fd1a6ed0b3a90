"""An API server's calls to workers of which some never answer, as on an unreachable host."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve.api.errors import Failure
from serve.cluster import ray_pool
from serve.cluster.ray_pool import RayPool
from serve.messages import ModelInfo
from tests.live_server import INFO


class _Handle:
    """A deployment handle whose `info` returns what `answer` does."""

    def __init__(self, answer: Callable[[], Awaitable[ModelInfo]]) -> None:
        self._answer = answer
        self.num_calls = 0
        self.info = self

    def options(self, **_: Any) -> "_Handle":
        return self

    def remote(self) -> Awaitable[ModelInfo]:
        self.num_calls += 1
        return self._answer()


async def _answers() -> ModelInfo:
    return INFO


async def _is_silent() -> ModelInfo:
    await asyncio.Event().wait()
    raise AssertionError


def _pool(handle: _Handle) -> RayPool:
    return RayPool(handle, handle, api_server_name="api-server-test")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray_pool, "_MODEL_INFO_TTL_S", 0.05)


def test_an_unreachable_worker_delays_no_request() -> None:
    async def call() -> tuple[list[ModelInfo], int]:
        handle = _Handle(_answers)
        pool = _pool(handle)
        await pool.model_info()
        handle._answer, handle.num_calls = _is_silent, 0
        await asyncio.sleep(0.06)
        infos = await asyncio.gather(*(pool.model_info() for _ in range(20)))
        return list(infos), handle.num_calls

    infos, num_calls = asyncio.run(asyncio.wait_for(call(), 10))
    assert infos == [INFO] * 20
    assert num_calls == 1, "the others use the cached value"


def test_the_first_call_is_retried() -> None:
    async def call() -> ModelInfo:
        handle = _Handle(_is_silent)
        calling = asyncio.create_task(_pool(handle).model_info())
        await asyncio.sleep(0.15)
        handle._answer = _answers
        return await calling

    assert asyncio.run(asyncio.wait_for(call(), 10)) == INFO


def test_without_any_answer_the_client_may_retry() -> None:
    with pytest.raises(Failure) as refused:
        asyncio.run(asyncio.wait_for(_pool(_Handle(_is_silent)).model_info(), 10))
    assert (refused.value.status, refused.value.code) == (503, "unavailable")
    assert refused.value.headers["retry-after"] == "1"
