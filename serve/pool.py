"""What the edge asks of the workers, wherever they run: in this process, or as Ray Serve replicas.

One protocol, so that the same HTTP application is tested against a worker in its own process, serves from one without
Ray, and serves a cluster. No torch, no ray.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from serve.messages import GenerationEvent, GenerationJob, ModelInfo


class WorkerPool(Protocol):
    """All workers of one model, as the edge sees them. Every method may be called at the same time by many requests."""

    async def model_info(self) -> ModelInfo:
        """The model that is served. Asked for by each request, so it must be cheap: the pool keeps it."""
        ...

    def draw(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        """The job's events; the last is `Finished` or `Refused`.

        An asynchronous generator: closing it (`aclose`), or cancelling the task that waits for its next event, cancels
        the drawing and frees its slots.
        """
        ...

    async def metrics_text(self) -> str:
        """Prometheus text of all workers and of the other edges, each sample with a `replica` label."""
        ...

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """Counts `cost` against a key's rate, across all edges.

        Returns:
            0.0 when it was taken; else the seconds after which it could be, with nothing taken.
        """
        ...

    async def ready(self) -> bool:
        """True when a worker is up and takes jobs."""
        ...
