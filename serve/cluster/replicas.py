"""Ray Serve replica classes: worker, API server, coordinator. Each wraps a class that knows nothing of Ray.

All replicas report their metrics to the coordinator once a second, and bind Ray's gRPC server to the node's address.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.cluster.autoscaling import SEQUENCES, SLOTS
from serve.cluster.coordinator import REPORT_EVERY_S, Coordinator
from serve.cluster.open_requests import OpenRequests
from serve.cluster.ray_pool import CALL_TIMEOUT_S, CONNECTION_ERRORS, RayPool
from serve.cluster.rerun import with_heartbeats
from serve.messages import EmbeddingJob, Embeddings, GenerationEvent, GenerationJob, ModelInfo, Refused
from serve.process import log_to_stderr, process_name
from serve.settings import ServeSettings


class WorkerReplica:
    """A `Worker`, one accelerator. `coordinator` is the handle of the coordinator's deployment."""

    def __init__(self, settings: ServeSettings, coordinator: DeploymentHandle) -> None:
        from serve.worker.worker import Worker  # imports torch, which no API server needs

        _bind_to_node_address()
        log_to_stderr()
        self._worker = Worker(settings)
        self._reports = _report_forever(coordinator, process_name("worker"), self._worker.metrics_text)

    async def generate(self, job: GenerationJob) -> AsyncGenerator[GenerationEvent | None, None]:
        async for event in with_heartbeats(self._worker.generate(job)):
            yield event

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        return await self._worker.embed(job)

    async def info(self) -> ModelInfo:
        return self._worker.info

    async def is_ready(self) -> bool:
        self._worker.check_health()
        return not self._worker.is_draining

    async def start_draining(self) -> None:
        """Refuses new jobs from now on; accepted jobs run to their end."""
        self._worker.is_draining = True

    def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        self._worker.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Input of serve/cluster/autoscaling.py."""
        return {SEQUENCES: self._worker.slots_in_use + self._worker.queued_sequences, SLOTS: self._worker.num_slots}

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # missing when the model could not be loaded
            self._worker.close()


@ray_serve.ingress()
class ApiServerReplica:
    """The HTTP application; Ray calls `__serve_build_asgi_app__` after the constructor."""

    def __init__(self, settings: ServeSettings, workers: DeploymentHandle, coordinator: DeploymentHandle) -> None:
        _bind_to_node_address()
        log_to_stderr()
        self._settings, self._coordinator = settings, coordinator
        self._pool = RayPool(workers, coordinator, api_server_name=process_name("api-server"))
        self._requests: OpenRequests | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api.application import build_api

        app = build_api(self._pool, self._settings, replica=self._pool.api_server_name)
        texts = (app.state.metrics.text, self._pool.own_metrics_text)
        self._reports = _report_forever(
            self._coordinator, self._pool.api_server_name, lambda: "".join(text() for text in texts)
        )
        self._requests = OpenRequests(app)
        return self._requests

    async def wait_for_open_requests(self) -> None:
        """Returns when every request that is open now has been answered."""
        if self._requests is not None:
            await self._requests.wait()


class CoordinatorReplica:
    """The `Coordinator`; one replica for the whole application."""

    def __init__(self) -> None:
        _bind_to_node_address()
        log_to_stderr()
        self._coordinator = Coordinator()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        return self._coordinator.take(key_id, per_minute, cost)

    async def report(self, replica: str, text: str) -> None:
        self._coordinator.report(replica, text)

    async def reports(self) -> dict[str, str]:
        return self._coordinator.reports()


def _report_forever(coordinator: DeploymentHandle, name: str, text: Callable[[], str]) -> "asyncio.Task[None]":
    """Starts the task that sends a process's metrics to the coordinator; needs a running event loop."""

    async def report() -> None:
        while True:
            with suppress(
                *CONNECTION_ERRORS, TimeoutError
            ):  # while the coordinator is replaced: the next report will do
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await coordinator.report.remote(name, text())
            await asyncio.sleep(REPORT_EVERY_S)

    return asyncio.get_running_loop().create_task(report())


def _bind_to_node_address() -> None:
    """Binds this replica's gRPC server to the node's address.

    Ray opens it on all interfaces, whatever the node's address is (`"[::]:0"` in ray/serve/_private/replica.py), after
    the constructor has run. It rejects every call without the cluster's token, but a server for one machine should have
    no port on the network at all.
    """
    from ray.serve._private import replica

    address = ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = partial(_add_port_at, replica.add_port_to_grpc_server, host)


def _add_port_at(add_port: Callable[[Any, str], int], host: str, server: Any, address: str) -> int:
    return add_port(server, f"{host}:{address.rpartition(':')[2]}")
