"""A Ray of its own on one machine, for nobody else: what `python -m serve` starts, waits for and ends.

Every port that its processes open is on 127.0.0.1; the proxy alone listens where it is told to. Without a token that only
this user can read they answer nothing, but for three that give Ray's own counters to Prometheus: any program on this
machine may read those. No dashboard, no client server.
"""

import logging
import time

import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.app import API_SERVER, APP_NAME, ASK_TIMEOUT_S, LOGGING, LOST, WORKER, brief, build
from serve.arguments import AppArguments
from serve.messages import ModelInfo

_log = logging.getLogger(__name__)


def start_local(arguments: AppArguments, *, host: str, port: int, temp_dir: str) -> None:
    """Starts a Ray that listens on loopback only, a proxy at `host:port`, and the application; returns when it runs.

    The environment (serve/cluster/ray_environment.py) must have been set before this module was imported.

    Raises:
        RuntimeError: the application did not start; the message holds the reason's traceback.
    """
    ray.init(
        address="local",
        include_dashboard=False,
        namespace="serve",
        log_to_driver=True,
        logging_level=logging.WARNING,
        object_store_memory=128 * 2**20,  # pictures do not pass it: they are gRPC messages
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=LOGGING.model_dump()
    )
    try:
        ray_serve.run(build(arguments.model_dump()), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise RuntimeError(_why_not_running() or str(error)) from error


def _why_not_running() -> str:
    """What Ray Serve knows of deployments that are not healthy."""
    status = ray_serve.status().applications[APP_NAME]
    return "\n".join(one.message for one in status.deployments.values() if one.message)


def drain(*, within_s: float) -> bool:
    """Lets what is being drawn be finished and answered; what is new is refused.

    Ray Serve's own shutdown kills the proxy first, and every answer that it is passing on.

    Returns:
        False where something was still being drawn after `within_s` seconds.
    """
    try:
        _handle(WORKER).broadcast("take_no_more").results(timeout_s=ASK_TIMEOUT_S)
        _handle(API_SERVER).broadcast("finish").results(timeout_s=within_s)
    except TimeoutError:
        return False
    except LOST as error:
        _log.warning("could not wait for the last drawings: %s", brief(error))
        return False
    time.sleep(0.2)  # for the proxy to pass on the last bytes
    return True


def end_local() -> None:
    """Ends all that `start_local` started, at once."""
    ray.shutdown()


def is_alive() -> bool:
    """Whether Ray and Serve's controller still answer."""
    try:
        return APP_NAME in ray_serve.status().applications
    except LOST:
        return False


def served_model() -> ModelInfo:
    """The model of the running application."""
    info: ModelInfo = _handle(WORKER).info.remote().result(timeout_s=30)
    return info


def _handle(deployment: str) -> DeploymentHandle:
    return ray_serve.get_deployment_handle(deployment, APP_NAME)
