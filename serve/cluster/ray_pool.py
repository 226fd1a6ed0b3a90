"""`WorkerPool` over Ray Serve handles: how an API server reaches the workers and the coordinator of its application.

A job is sent to a worker and its events are streamed back; serve/cluster/rerun.py sends the job again when that worker
dies. Everything is passed by value.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import cast

import grpc
from prometheus_client import CollectorRegistry, Counter, generate_latest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve.api.errors import Failure
from serve.api.rate_limits import RateLimiter
from serve.cluster.rerun import WorkerLost, generate_with_reruns
from serve.cluster.saturated_workers import SaturatedWorkers
from serve.messages import EmbeddingJob, Embeddings, GenerationEvent, GenerationJob, ModelInfo, Refused
from serve.metrics import merge_expositions

CALL_TIMEOUT_S = 2.0  # of short calls between replicas
_MODEL_INFO_TTL_S = 10.0
_FIRST_MODEL_INFO_CALLS = 5

# Raised by a call whose remote process, or the connection to it, is gone. Exceptions of the worker's own code keep their
# types.
CONNECTION_ERRORS = (RayError, RayServeException, grpc.RpcError)

_log = logging.getLogger(__name__)


class RayPool:
    """The workers of a Ray Serve application, as one API server uses them: see serve/pool.py."""

    def __init__(self, workers: DeploymentHandle, coordinator: DeploymentHandle, *, api_server_name: str) -> None:
        self._workers, self._coordinator = workers, coordinator
        self._generate = workers.options(method_name="generate", stream=True)
        self.api_server_name = api_server_name
        self._info: ModelInfo | None = None
        self._info_until_s = 0.0
        self._own_limiter = RateLimiter()
        self._saturated_workers = SaturatedWorkers()
        self._registry = CollectorRegistry()
        self._reruns = Counter(
            "kodalle_reruns", "Jobs sent to another worker after theirs died.", registry=self._registry
        )

    async def model_info(self) -> ModelInfo:
        """The served model, cached for 10 s: after a deployment that replaced the model the cache expires.

        A worker on a partitioned host never answers. The cached value is used until some worker answers again; meanwhile
        one request at a time retries the call and the others do not wait for it.

        Raises:
            Failure: nothing is cached and no worker answers.
        """
        if self._info is not None and time.monotonic() <= self._info_until_s:
            return self._info
        self._info_until_s = time.monotonic() + CALL_TIMEOUT_S
        for _ in range(1 if self._info is not None else _FIRST_MODEL_INFO_CALLS):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    self._info = await self._workers.info.remote()
            except (*CONNECTION_ERRORS, TimeoutError) as error:
                _log.warning("a worker did not return its model info: %s", one_line(error))
                continue
            self._info_until_s = time.monotonic() + _MODEL_INFO_TTL_S
            break
        if self._info is None:
            raise Failure("unavailable", retry_after_s=1.0)
        return self._info

    def generate(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        return generate_with_reruns(
            self._send, job, on_rerun=self._reruns.inc, saturated_workers=self._saturated_workers
        )

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        """Sent to a second worker when the first one dies or is draining."""
        refused = Refused("failed", "its workers died")
        for _ in range(2):
            try:
                answer: Embeddings | Refused = await self._workers.embed.remote(job)
            except CONNECTION_ERRORS as error:
                _log.warning("embeddings %s lost their worker: %s", job.request_id, one_line(error))
                continue
            if isinstance(answer, Embeddings) or answer.reason != "draining":
                return answer
            refused = answer
        return refused

    async def metrics_text(self) -> str:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reports = await self._coordinator.reports.remote()
        except (*CONNECTION_ERRORS, TimeoutError) as error:
            _log.warning("the coordinator does not answer, metrics of other processes are missing: %s", one_line(error))
            return self.own_metrics_text()
        reports.pop(self.api_server_name, None)  # replaced by this API server's own, which are newer
        reports[self.api_server_name] = self.own_metrics_text()
        return await asyncio.to_thread(merge_expositions, reports)

    def own_metrics_text(self) -> str:
        return generate_latest(self._registry).decode()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """Falls back to a local limiter while the coordinator is being replaced, so limits hold for each API server."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return float(await self._coordinator.take.remote(key_id, per_minute, cost))
        except (*CONNECTION_ERRORS, TimeoutError) as error:
            _log.warning("the coordinator does not answer, rate limits are local for now: %s", one_line(error))
            return self._own_limiter.take(key_id, per_minute, cost, time.monotonic())

    async def ready(self) -> bool:
        for _ in range(2):  # the first call may reach a worker that is being replaced
            with suppress(*CONNECTION_ERRORS, TimeoutError):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    if await self._workers.is_ready.remote():
                        return True
        return False

    async def _send(self, job: GenerationJob) -> AsyncGenerator[GenerationEvent | None, None]:
        response = cast(DeploymentResponseGenerator[GenerationEvent | None], self._generate.remote(job))
        try:
            async for event in response:
                yield event
        except CONNECTION_ERRORS as error:
            raise WorkerLost(one_line(error)) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost("its replica cancelled it") from None  # a replica that Ray is killing
        finally:
            response.cancel()


def one_line(error: BaseException) -> str:
    """An exception's type and first line, for a log message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
