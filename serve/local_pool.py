"""One worker in the same process as the HTTP server: serving without Ray."""

import time
from collections.abc import AsyncIterator

from serve.api.rate_limits import RateLimiter
from serve.messages import EmbeddingJob, Embeddings, GenerationEvent, GenerationJob, ModelInfo, Refused
from serve.settings import ServeSettings
from serve.worker.worker import Worker


class LocalPool:
    """`WorkerPool` (serve/pool.py) over one worker in this process; `close` stops the worker.

    Raises:
        InputError: the settings name no model that can be loaded.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.worker = Worker(settings)
        self._limiter = RateLimiter()

    async def model_info(self) -> ModelInfo:
        return self.worker.info

    def generate(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        return self.worker.generate(job)

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        return await self.worker.embed(job)

    async def metrics_text(self) -> str:
        return self.worker.metrics_text()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        return self._limiter.take(key_id, per_minute, cost, time.monotonic())

    async def ready(self) -> bool:
        self.worker.check_health()
        return not self.worker.is_draining

    def close(self) -> None:
        self.worker.close()
