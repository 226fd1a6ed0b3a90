"""The Ray Serve application: API servers, workers, and the coordinator that they share.

    client ─► proxy, one a node ─► ApiServer (serve/api/application.py) ─► Worker (serve/worker/worker.py), one an accelerator
              serve/cluster/gate.py          │                                        │
                                             └──► Coordinator (serve/cluster/coordinator.py) ◄───┘  rate limits, metrics

    serve run configs/serve.yaml        on this machine
    serve deploy configs/serve.yaml     on a cluster
    python -m serve                     with a private Ray, see serve/local_ray.py

The replica classes are in serve/cluster/replicas.py. A worker's scheduler owns the only queue, because it knows sequences,
slots and deadlines where Ray Serve counts requests. So Ray's own limits on requests per replica are set above what the
scheduler admits and are never reached.
"""

from collections.abc import Callable
from typing import Any, cast

import ray
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from serve.arguments import AppArguments, read_arguments
from serve.cluster.replicas import ApiServerReplica, CoordinatorReplica, WorkerReplica

APP_NAME = "kodalle"
API_SERVER, WORKER, COORDINATOR = "ApiServer", "Worker", "Coordinator"

# A refused job counts as a request of its worker until the refusal is sent: headroom for a burst of that many beside the
# accepted jobs, each of which has at least one sequence.
_MAX_CONCURRENT_REFUSALS = 1024
_MAX_SLOTS = 256  # of a worker that chooses its number itself
_MAX_REQUESTS_PER_API_SERVER = 4096  # one connection each; more are 429
LOGGING = LoggingConfig(
    enable_access_log=False, log_level="WARNING"
)  # serve/api/middleware.py logs one line per request


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application that `serve run serve.app:build key=value …` and `import_path: serve.app:build` deploy.

    Args:
        args: fields of `AppArguments`.

    Raises:
        InputError: an unknown field, or a value out of its range.
    """
    arguments = read_arguments(args, source="the application's args")
    settings = arguments.settings()
    deployment = cast(Callable[..., Any], ray_serve.deployment)
    coordinator = deployment(CoordinatorReplica, name=COORDINATOR, **_light_options(1)).bind()
    workers = deployment(WorkerReplica, name=WORKER, **_worker_options(arguments)).bind(settings, coordinator)
    api_servers = deployment(ApiServerReplica, name=API_SERVER, **_api_server_options(arguments)).bind(
        settings, workers, coordinator
    )
    return cast(ray_serve.Application, api_servers)


def _light_options(num_replicas: int) -> dict[str, Any]:
    """Options of deployments that compute little: no reserved core, and updates start new replicas before old ones stop."""
    return {
        "num_replicas": num_replicas,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": _MAX_REQUESTS_PER_API_SERVER,
        "max_surge_percent": 100,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.25,
        "logging_config": LOGGING,
    }


def _api_server_options(arguments: AppArguments) -> dict[str, Any]:
    return _light_options(arguments.num_api_servers) | {
        "max_queued_requests": _MAX_REQUESTS_PER_API_SERVER,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1.0),
        # An API server's last request ends after its worker's last job.
        "graceful_shutdown_timeout_s": arguments.drain_s + 10.0,
    }


def _worker_options(arguments: AppArguments) -> dict[str, Any]:
    sequences = (arguments.num_slots or _MAX_SLOTS) + arguments.max_queued_sequences
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": arguments.cpus_per_worker, "num_gpus": _gpus_per_worker(arguments)},
        "max_ongoing_requests": sequences + _MAX_CONCURRENT_REFUSALS,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.25,
        "graceful_shutdown_timeout_s": arguments.drain_s + 5.0,
        "logging_config": LOGGING,
    }
    if not arguments.max_workers:
        return options | {"num_replicas": arguments.num_workers}
    return options | {"autoscaling_config": autoscaling(arguments)}


def autoscaling(arguments: AppArguments) -> AutoscalingConfig:
    """Between `num_workers` and `max_workers` workers, by the share of slots in use."""
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
