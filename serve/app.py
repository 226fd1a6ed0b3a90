"""The Ray Serve application: HTTP edges, workers, and the coordinator that all of them share.

    client ─► proxy, one a node ─► Edge (serve/api/application.py) ─► Worker (serve/worker/worker.py), one an accelerator
              serve/cluster/gate.py          │                                           │
                                             └──► Coordinator (serve/cluster/coordinator.py) ◄─────┘  rates, figures

    serve run configs/serve.yaml        on this machine
    serve deploy configs/serve.yaml     on a cluster
    python -m serve                     a Ray of its own, see serve/local_ray.py

A worker's scheduler owns the only queue: it knows rows, slots and deadlines, Ray Serve knows numbers of requests. So
Ray's own limit of requests a replica is set above what the scheduler admits, and never reached.

An edge sends a job and reads its events (serve/cluster/rerun.py sends it again where a worker dies). Everything is passed by
value; nothing here computes.

Besides serve/local_ray.py the only file that imports ray.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import grpc  # type: ignore[import-untyped]
import ray
from prometheus_client import CollectorRegistry, Counter, generate_latest
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig

from serve.api.errors import Failure
from serve.api.rate_limits import RateLimiter
from serve.arguments import AppArguments, read_arguments
from serve.cluster.autoscaling import ROWS, SLOTS
from serve.cluster.coordinator import REPORT_EVERY_S, Coordinator
from serve.cluster.open_requests import OpenRequests
from serve.cluster.rerun import WorkerLost, generate_with_reruns, with_beats
from serve.cluster.saturated_workers import SaturatedWorkers
from serve.messages import GenerationEvent, GenerationJob, ModelInfo
from serve.metrics import merge_expositions
from serve.process import log_to_stderr, process_name
from serve.settings import ServeSettings

APP_NAME = "kodalle"
API_SERVER, WORKER, COORDINATOR = "Edge", "Worker", "Coordinator"

# What a worker refuses is a request of it for as long as that takes: room for a burst of so many beside the jobs that it
# took on, each of which has at least one row.
_REFUSED_AT_ONCE = 1024
_MAX_SLOTS = 256  # of a worker that chooses its number itself
_MAX_REQUESTS_AN_EDGE = 4096  # a connection each; beyond them 429
ASK_TIMEOUT_S = 2.0
_INFO_KEPT_S = 10.0
_FIRST_ASKS = 5
LOGGING = LoggingConfig(
    enable_access_log=False, log_level="WARNING"
)  # serve/api/middleware.py writes the line of a request

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------ the replicas


class WorkerReplica:
    """One accelerator. `coordinator` is the handle of the Coordinator deployment."""

    def __init__(self, settings: ServeSettings, coordinator: DeploymentHandle) -> None:
        from serve.worker.worker import Worker  # with torch, which no edge needs

        _keep_to_node_address()
        log_to_stderr()
        self._worker = Worker(settings)
        self._reports = _report_forever(coordinator, process_name("worker"), self._worker.metrics_text)

    async def draw(self, job: GenerationJob) -> AsyncGenerator[GenerationEvent | None, None]:
        async for event in with_beats(self._worker.draw(job)):
            yield event

    async def info(self) -> ModelInfo:
        return self._worker.info

    async def is_ready(self) -> bool:
        self._worker.check_health()
        return not self._worker.is_draining

    async def take_no_more(self) -> None:
        """What was taken on is drawn; what is new is refused."""
        self._worker.is_draining = True

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        self._worker.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For serve/cluster/autoscaling.py."""
        return {ROWS: self._worker.slots_in_use + self._worker.queued_sequences, SLOTS: self._worker.num_slots}

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # not where the model could not be loaded
            self._worker.close()


@ray_serve.ingress()
class ApiServerReplica:
    """One HTTP application: Ray asks for it after the constructor."""

    def __init__(self, settings: ServeSettings, workers: DeploymentHandle, coordinator: DeploymentHandle) -> None:
        _keep_to_node_address()
        log_to_stderr()
        self._settings, self._ledger = settings, coordinator
        self._pool = RayPool(workers, coordinator, api_server_name=process_name("edge"))
        self._requests: OpenRequests | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api.application import build_api

        app = build_api(self._pool, self._settings, replica=self._pool.api_server_name)
        texts = (app.state.metrics.text, self._pool.own_metrics_text)
        self._reports = _report_forever(
            self._ledger, self._pool.api_server_name, lambda: "".join(text() for text in texts)
        )
        self._requests = OpenRequests(app)
        return self._requests

    async def finish(self) -> None:
        """Returns when all requests that are open now have been answered."""
        if self._requests is not None:
            await self._requests.finish()


class CoordinatorReplica:
    """Of which there is one."""

    def __init__(self) -> None:
        _keep_to_node_address()
        log_to_stderr()
        self._ledger = Coordinator()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        return self._ledger.take(key_id, per_minute, cost)

    async def report(self, replica: str, text: str) -> None:
        self._ledger.report(replica, text)

    async def reports(self) -> dict[str, str]:
        return self._ledger.reports()


# ---------------------------------------------------------------------------------------------- an edge's way to them

# What a call raises when the process at its other end, or the way there, is gone. Errors of the worker's own code come
# as their own types.
LOST = (RayError, RayServeException, grpc.RpcError)


class RayPool:
    """The workers of a Ray Serve application, as an edge sees them: see serve/pool.py."""

    def __init__(self, workers: DeploymentHandle, coordinator: DeploymentHandle, *, api_server_name: str) -> None:
        self._workers, self._ledger = workers, coordinator
        self._draw = workers.options(method_name="draw", stream=True)
        self.api_server_name = api_server_name
        self._info: ModelInfo | None = None
        self._info_until_s = 0.0
        self._own_limiter = RateLimiter()
        self._saturated_workers = SaturatedWorkers()
        self._registry = CollectorRegistry()
        self._reruns = Counter("kodalle_reruns", "Drawings sent again: their worker died.", registry=self._registry)

    async def model_info(self) -> ModelInfo:
        """Kept for 10 s, so that an edge that met a worker of the last version finds the new one out.

        A worker on a host that was cut off never answers. What is known serves on until another one does; meanwhile one
        request at a time asks, and the others do not wait.

        Raises:
            Failure: nothing is known and no worker answers.
        """
        if self._info is not None and time.monotonic() <= self._info_until_s:
            return self._info
        self._info_until_s = time.monotonic() + ASK_TIMEOUT_S
        for _ in range(1 if self._info is not None else _FIRST_ASKS):
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    self._info = await self._workers.info.remote()
            except (*LOST, TimeoutError) as error:
                _log.warning("a worker does not tell its model: %s", brief(error))
                continue
            self._info_until_s = time.monotonic() + _INFO_KEPT_S
            break
        if self._info is None:
            raise Failure("unavailable", retry_after_s=1.0)
        return self._info

    def draw(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        return generate_with_reruns(
            self._send, job, on_rerun=self._reruns.inc, saturated_workers=self._saturated_workers
        )

    async def metrics_text(self) -> str:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                reports = await self._ledger.reports.remote()
        except (*LOST, TimeoutError) as error:
            _log.warning("the coordinator does not answer, figures of other processes are missing: %s", brief(error))
            return self.own_metrics_text()
        reports.pop(self.api_server_name, None)  # the edge adds its own, which are newer
        reports[self.api_server_name] = self.own_metrics_text()
        return await asyncio.to_thread(merge_expositions, reports)

    def own_metrics_text(self) -> str:
        return generate_latest(self._registry).decode()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """While the coordinator is being replaced each edge counts for itself, so that nobody is locked out or let loose."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return float(await self._ledger.take.remote(key_id, per_minute, cost))
        except (*LOST, TimeoutError) as error:
            _log.warning("the coordinator does not answer, this edge counts rates alone: %s", brief(error))
            return self._own_limiter.take(key_id, per_minute, cost, time.monotonic())

    async def ready(self) -> bool:
        for _ in range(2):  # the first may have asked one that is being replaced
            with suppress(*LOST, TimeoutError):
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    if await self._workers.is_ready.remote():
                        return True
        return False

    async def _send(self, job: GenerationJob) -> AsyncGenerator[GenerationEvent | None, None]:
        response = cast(DeploymentResponseGenerator[GenerationEvent | None], self._draw.remote(job))
        try:
            async for event in response:
                yield event
        except LOST as error:
            raise WorkerLost(brief(error)) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost("its replica cancelled it") from None  # one that Ray is killing
        finally:
            response.cancel()


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _report_forever(coordinator: DeploymentHandle, name: str, text: Callable[[], str]) -> "asyncio.Task[None]":
    """Sends a process's figures to the coordinator; call it where an event loop runs."""

    async def report() -> None:
        while True:
            with suppress(*LOST, TimeoutError):  # a coordinator that is being replaced gets the next one
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    await coordinator.report.remote(name, text())
            await asyncio.sleep(REPORT_EVERY_S)

    return asyncio.get_running_loop().create_task(report())


def _keep_to_node_address() -> None:
    """Binds this replica's gRPC server to the node's address.

    Ray opens it on all interfaces, whatever the node's address is (`"[::]:0"` in ray/serve/_private/replica.py), after
    the constructor has run. It answers nobody without the cluster's token, but a server for one machine has no port
    on the network at all.
    """
    from ray.serve._private import replica

    address = ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = partial(_add_port_at, replica.add_port_to_grpc_server, host)


def _add_port_at(add_port: Callable[[Any, str], int], host: str, server: Any, address: str) -> int:
    return add_port(server, f"{host}:{address.rpartition(':')[2]}")


# -------------------------------------------------------------------------------------------------- the application


def build(args: dict[str, Any]) -> ray_serve.Application:
    """What `serve run serve.app:build key=value …` and a config's `import_path: serve.app:build` call.

    Args:
        args: fields of `AppArguments`.

    Raises:
        InputError: an unknown field, or a value that does not fit.
    """
    arguments = read_arguments(args, source="the application's args")
    settings = arguments.settings()
    deployment = cast(Callable[..., Any], ray_serve.deployment)
    coordinator = deployment(CoordinatorReplica, name=COORDINATOR, **_small(1)).bind()
    workers = deployment(WorkerReplica, name=WORKER, **_worker_options(arguments)).bind(settings, coordinator)
    api_servers = deployment(ApiServerReplica, name=API_SERVER, **_edge_options(arguments)).bind(
        settings, workers, coordinator
    )
    return cast(ray_serve.Application, api_servers)


def _small(num_replicas: int) -> dict[str, Any]:
    """Options of processes that compute little: no core is set aside, and new ones start before old ones stop."""
    return {
        "num_replicas": num_replicas,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": _MAX_REQUESTS_AN_EDGE,
        "max_surge_percent": 100,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.25,
        "logging_config": LOGGING,
    }


def _edge_options(arguments: AppArguments) -> dict[str, Any]:
    return _small(arguments.num_api_servers) | {
        "max_queued_requests": _MAX_REQUESTS_AN_EDGE,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        # An edge's last request ends after its worker's last drawing.
        "graceful_shutdown_timeout_s": arguments.drain_s + 10.0,
    }


def _worker_options(arguments: AppArguments) -> dict[str, Any]:
    rows = (arguments.num_slots or _MAX_SLOTS) + arguments.max_queued_sequences
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": arguments.cpus_per_worker, "num_gpus": _gpus_per_worker(arguments)},
        "max_ongoing_requests": rows + _REFUSED_AT_ONCE,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.25,
        "graceful_shutdown_timeout_s": arguments.drain_s + 5.0,
        "logging_config": LOGGING,
    }
    if not arguments.max_workers:
        return options | {"num_replicas": arguments.num_workers}
    return options | {"autoscaling_config": autoscaling(arguments)}


def autoscaling(arguments: AppArguments) -> AutoscalingConfig:
    """Workers by slots in use, between `num_workers` and `max_workers`."""
    return AutoscalingConfig(
        min_replicas=arguments.num_workers,
        max_replicas=arguments.max_workers,
        upscale_delay_s=arguments.scale_up_after_s,
        downscale_delay_s=arguments.scale_down_after_s,
        look_back_period_s=max(2.0, min(30.0, arguments.scale_up_after_s)),
        policy=AutoscalingPolicy(
            policy_function="serve.cluster.autoscaling:SlotsPolicy",
            policy_kwargs={"target_share": arguments.target_share},
        ),
    )


def _gpus_per_worker(arguments: AppArguments) -> float:
    if arguments.gpus_per_worker is not None:
        return arguments.gpus_per_worker
    if arguments.device == "cpu":
        return 0.0
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
