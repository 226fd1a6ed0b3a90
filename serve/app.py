"""The Ray Serve application: HTTP edges, drawers, and the ledger that all of them share.

    client ─► proxy, one a node ─► Edge (serve/api/application.py) ─► Drawer (serve/worker/worker.py), one an accelerator
              serve/cluster/gate.py          │                                           │
                                             └──► Ledger (serve/cluster/coordinator.py) ◄─────┘  rates, figures

    serve run configs/serve.yaml        on this machine
    serve deploy configs/serve.yaml     on a cluster
    python -m serve                     a Ray of its own, see serve/local_ray.py

A drawer's scheduler owns the only queue: it knows rows, slots and deadlines, Ray Serve knows numbers of requests. So
Ray's own limit of requests a replica is set above what the scheduler admits, and never reached.

An edge sends a job and reads its events (serve/cluster/rerun.py sends it again where a drawer dies). Everything is passed by
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
from serve.cluster.coordinator import REPORT_EVERY_S, Ledger
from serve.cluster.open_requests import OpenRequests
from serve.cluster.rerun import DrawerLost, draw_with_reruns, with_beats
from serve.cluster.saturated_workers import LatelyFull
from serve.messages import DrawEvent, DrawJob, ModelInfo
from serve.metrics import merge_expositions
from serve.process import log_to_stderr, process_name
from serve.settings import ServeSettings

APP_NAME = "kodalle"
EDGE, DRAWER, LEDGER = "Edge", "Drawer", "Ledger"

# What a drawer refuses is a request of it for as long as that takes: room for a burst of so many beside the jobs that it
# took on, each of which has at least one row.
_REFUSED_AT_ONCE = 1024
_MAX_SLOTS = 256  # of a drawer that chooses its number itself
_MAX_REQUESTS_AN_EDGE = 4096  # a connection each; beyond them 429
ASK_TIMEOUT_S = 2.0
_INFO_KEPT_S = 10.0
_FIRST_ASKS = 5
LOGGING = LoggingConfig(
    enable_access_log=False, log_level="WARNING"
)  # serve/api/middleware.py writes the line of a request

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------ the replicas


class DrawerReplica:
    """One accelerator. `ledger` is the handle of the Ledger deployment."""

    def __init__(self, settings: ServeSettings, ledger: DeploymentHandle) -> None:
        from serve.worker.worker import Drawer  # with torch, which no edge needs

        _keep_to_node_address()
        log_to_stderr()
        self._drawer = Drawer(settings)
        self._reports = _report_forever(ledger, process_name("drawer"), self._drawer.metrics_text)

    async def draw(self, job: DrawJob) -> AsyncGenerator[DrawEvent | None, None]:
        async for event in with_beats(self._drawer.draw(job)):
            yield event

    async def info(self) -> ModelInfo:
        return self._drawer.info

    async def is_ready(self) -> bool:
        self._drawer.check_health()
        return not self._drawer.is_draining

    async def take_no_more(self) -> None:
        """What was taken on is drawn; what is new is refused."""
        self._drawer.is_draining = True

    def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        self._drawer.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For serve/cluster/autoscaling.py."""
        return {ROWS: self._drawer.slots_in_use + self._drawer.queued_rows, SLOTS: self._drawer.num_slots}

    def __del__(self) -> None:
        if hasattr(self, "_drawer"):  # not where the model could not be loaded
            self._drawer.close()


@ray_serve.ingress()
class EdgeReplica:
    """One HTTP application: Ray asks for it after the constructor."""

    def __init__(self, settings: ServeSettings, drawers: DeploymentHandle, ledger: DeploymentHandle) -> None:
        _keep_to_node_address()
        log_to_stderr()
        self._settings, self._ledger = settings, ledger
        self._pool = RayPool(drawers, ledger, edge_name=process_name("edge"))
        self._requests: OpenRequests | None = None

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api.application import build_edge

        app = build_edge(self._pool, self._settings, replica=self._pool.edge_name)
        texts = (app.state.metrics.text, self._pool.own_metrics_text)
        self._reports = _report_forever(self._ledger, self._pool.edge_name, lambda: "".join(text() for text in texts))
        self._requests = OpenRequests(app)
        return self._requests

    async def finish(self) -> None:
        """Returns when all requests that are open now have been answered."""
        if self._requests is not None:
            await self._requests.finish()


class LedgerReplica:
    """Of which there is one."""

    def __init__(self) -> None:
        _keep_to_node_address()
        log_to_stderr()
        self._ledger = Ledger()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        return self._ledger.take(key_id, per_minute, cost)

    async def report(self, replica: str, text: str) -> None:
        self._ledger.report(replica, text)

    async def reports(self) -> dict[str, str]:
        return self._ledger.reports()


# ---------------------------------------------------------------------------------------------- an edge's way to them

# What a call raises when the process at its other end, or the way there, is gone. Errors of the drawer's own code come
# as their own types.
LOST = (RayError, RayServeException, grpc.RpcError)


class RayPool:
    """The drawers of a Ray Serve application, as an edge sees them: see serve/pool.py."""

    def __init__(self, drawers: DeploymentHandle, ledger: DeploymentHandle, *, edge_name: str) -> None:
        self._drawers, self._ledger = drawers, ledger
        self._draw = drawers.options(method_name="draw", stream=True)
        self.edge_name = edge_name
        self._info: ModelInfo | None = None
        self._info_until_s = 0.0
        self._own_limiter = RateLimiter()
        self._lately_full = LatelyFull()
        self._registry = CollectorRegistry()
        self._reruns = Counter("kodalle_reruns", "Drawings sent again: their drawer died.", registry=self._registry)

    async def model_info(self) -> ModelInfo:
        """Kept for 10 s, so that an edge that met a drawer of the last version finds the new one out.

        A drawer on a host that was cut off never answers. What is known serves on until another one does; meanwhile one
        request at a time asks, and the others do not wait.

        Raises:
            Failure: nothing is known and no drawer answers.
        """
        if self._info is not None and time.monotonic() <= self._info_until_s:
            return self._info
        self._info_until_s = time.monotonic() + ASK_TIMEOUT_S
        for _ in range(1 if self._info is not None else _FIRST_ASKS):
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    self._info = await self._drawers.info.remote()
            except (*LOST, TimeoutError) as error:
                _log.warning("a drawer does not tell its model: %s", brief(error))
                continue
            self._info_until_s = time.monotonic() + _INFO_KEPT_S
            break
        if self._info is None:
            raise Failure("unavailable", retry_after_s=1.0)
        return self._info

    def draw(self, job: DrawJob) -> AsyncIterator[DrawEvent]:
        return draw_with_reruns(self._send, job, on_rerun=self._reruns.inc, lately_full=self._lately_full)

    async def metrics_text(self) -> str:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                reports = await self._ledger.reports.remote()
        except (*LOST, TimeoutError) as error:
            _log.warning("the ledger does not answer, figures of other processes are missing: %s", brief(error))
            return self.own_metrics_text()
        reports.pop(self.edge_name, None)  # the edge adds its own, which are newer
        reports[self.edge_name] = self.own_metrics_text()
        return await asyncio.to_thread(merge_expositions, reports)

    def own_metrics_text(self) -> str:
        return generate_latest(self._registry).decode()

    async def take(self, key_id: str, per_minute: float, cost: float) -> float:
        """While the ledger is being replaced each edge counts for itself, so that nobody is locked out or let loose."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return float(await self._ledger.take.remote(key_id, per_minute, cost))
        except (*LOST, TimeoutError) as error:
            _log.warning("the ledger does not answer, this edge counts rates alone: %s", brief(error))
            return self._own_limiter.take(key_id, per_minute, cost, time.monotonic())

    async def ready(self) -> bool:
        for _ in range(2):  # the first may have asked one that is being replaced
            with suppress(*LOST, TimeoutError):
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    if await self._drawers.is_ready.remote():
                        return True
        return False

    async def _send(self, job: DrawJob) -> AsyncGenerator[DrawEvent | None, None]:
        response = cast(DeploymentResponseGenerator[DrawEvent | None], self._draw.remote(job))
        try:
            async for event in response:
                yield event
        except LOST as error:
            raise DrawerLost(brief(error)) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise DrawerLost("its replica cancelled it") from None  # one that Ray is killing
        finally:
            response.cancel()


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _report_forever(ledger: DeploymentHandle, name: str, text: Callable[[], str]) -> "asyncio.Task[None]":
    """Sends a process's figures to the ledger; call it where an event loop runs."""

    async def report() -> None:
        while True:
            with suppress(*LOST, TimeoutError):  # a ledger that is being replaced gets the next one
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    await ledger.report.remote(name, text())
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
    ledger = deployment(LedgerReplica, name=LEDGER, **_small(1)).bind()
    drawers = deployment(DrawerReplica, name=DRAWER, **_drawer_options(arguments)).bind(settings, ledger)
    edges = deployment(EdgeReplica, name=EDGE, **_edge_options(arguments)).bind(settings, drawers, ledger)
    return cast(ray_serve.Application, edges)


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
    return _small(arguments.num_edges) | {
        "max_queued_requests": _MAX_REQUESTS_AN_EDGE,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        # An edge's last request ends after its drawer's last drawing.
        "graceful_shutdown_timeout_s": arguments.drain_s + 10.0,
    }


def _drawer_options(arguments: AppArguments) -> dict[str, Any]:
    rows = (arguments.num_slots or _MAX_SLOTS) + arguments.max_queued_rows
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": arguments.cpus_per_drawer, "num_gpus": _gpus_per_drawer(arguments)},
        "max_ongoing_requests": rows + _REFUSED_AT_ONCE,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.25,
        "graceful_shutdown_timeout_s": arguments.drain_s + 5.0,
        "logging_config": LOGGING,
    }
    if not arguments.max_drawers:
        return options | {"num_replicas": arguments.num_drawers}
    return options | {"autoscaling_config": autoscaling(arguments)}


def autoscaling(arguments: AppArguments) -> AutoscalingConfig:
    """Drawers by slots in use, between `num_drawers` and `max_drawers`."""
    return AutoscalingConfig(
        min_replicas=arguments.num_drawers,
        max_replicas=arguments.max_drawers,
        upscale_delay_s=arguments.scale_up_after_s,
        downscale_delay_s=arguments.scale_down_after_s,
        look_back_period_s=max(2.0, min(30.0, arguments.scale_up_after_s)),
        policy=AutoscalingPolicy(
            policy_function="serve.cluster.autoscaling:SlotsPolicy",
            policy_kwargs={"target_share": arguments.target_share},
        ),
    )


def _gpus_per_drawer(arguments: AppArguments) -> float:
    if arguments.gpus_per_drawer is not None:
        return arguments.gpus_per_drawer
    if arguments.device == "cpu":
        return 0.0
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
