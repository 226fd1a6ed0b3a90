"""`WorkerPool`: the interface between the HTTP application and the workers, in this process or as Ray Serve replicas.

The same application runs against a scripted pool in tests, a worker in its own process (serve/local_pool.py) and a cluster
(serve/cluster/ray_pool.py). No torch, no ray.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from serve.messages import EmbeddingJob, Embeddings, GenerationEvent, GenerationJob, ModelInfo, Refused


class WorkerPool(Protocol):
    """All workers of one model, as an API server sees them. Many requests may call every method at the same time."""

    async def model_info(self) -> ModelInfo:
        """The served model. Every request calls this, so implementations cache it."""
        ...

    def generate(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        """The job's events; the last is `Finished` or `Refused`.

        An asynchronous generator: closing it (`aclose`), or cancelling the task that waits for its next event, cancels
        the job and frees its slots.
        """
        ...

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        """KoCLIP's embeddings; cancelling the task that waits for them cancels the job."""
        ...

    async def metrics_text(self) -> str:
        """Prometheus text of all workers and of the other API servers, each sample with a `replica` label."""
        ...

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """Takes `cost` from a key's rate limit, which all API servers share.

        Returns:
            0.0 when it was taken; otherwise nothing was taken, and a retry can succeed after so many seconds.
        """
        ...

    async def ready(self) -> bool:
        """Whether a worker is up and accepts jobs."""
        ...
