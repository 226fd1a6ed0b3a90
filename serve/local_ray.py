"""A private Ray on one machine: started, watched and stopped by `python -m serve`.

Every port that its processes open is on 127.0.0.1; only the proxy listens at the requested address. All ports require a
token that only this user can read, except three that export Ray's own counters to Prometheus: any program on this machine
may read those. No dashboard, no client server.
"""

import logging
import time

import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from engine.errors import InputError
from serve.app import API_SERVER, APP_NAME, LOGGING, WORKER, build
from serve.arguments import AppArguments, HttpOptions
from serve.cluster.ray_pool import CALL_TIMEOUT_S, CONNECTION_ERRORS, one_line
from serve.messages import ModelInfo

_log = logging.getLogger(__name__)


def start_local(arguments: AppArguments, http: HttpOptions, *, temp_dir: str) -> None:
    """Starts Ray on loopback, a proxy as in `http`, and the application; returns when it runs.

    The environment (serve/cluster/ray_environment.py) must have been set before this module was imported.

    Raises:
        InputError: Ray did not start.
        RuntimeError: the application did not start; the message holds the traceback of the cause.
    """
    try:
        _start_ray(http, temp_dir)
    except Exception as error:  # Ray raises plain ones: memory, disk, a socket's path that is too long, a dead process
        remedy = "Ray did not start: free memory and disk, use a TMPDIR with a short path, or serve with --without-ray"
        raise InputError("Ray", one_line(error), remedy) from error
    try:
        ray_serve.run(build(arguments.model_dump()), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise RuntimeError(_deployment_errors() or str(error)) from error


def _start_ray(http: HttpOptions, temp_dir: str) -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        namespace="serve",
        log_to_driver=True,
        logging_level=logging.WARNING,
        object_store_memory=128 * 2**20,  # images do not pass through it: they are gRPC messages
        _node_ip_address="127.0.0.1",
        _temp_dir=temp_dir,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location="HeadOnly", http_options=http.model_dump(), logging_config=LOGGING.model_dump())


def _deployment_errors() -> str:
    """Ray Serve's messages about deployments that are not healthy."""
    status = ray_serve.status().applications[APP_NAME]
    return "\n".join(one.message for one in status.deployments.values() if one.message)


def drain(*, within_s: float) -> bool:
    """Refuses new requests and waits until the accepted ones are answered.

    Ray Serve's own shutdown kills the proxy first, and with it every answer that is being sent.

    Returns:
        False when some request was still open after `within_s` seconds.
    """
    try:
        _handle(WORKER).broadcast("start_draining").results(timeout_s=CALL_TIMEOUT_S)
        _handle(API_SERVER).broadcast("wait_for_open_requests").results(timeout_s=within_s)
    except TimeoutError:
        return False
    except CONNECTION_ERRORS as error:
        _log.warning("could not wait for the open requests: %s", one_line(error))
        return False
    time.sleep(0.2)  # for the proxy to send the last bytes
    return True


def end_local() -> None:
    """Stops everything that `start_local` started, at once."""
    ray.shutdown()


def is_alive() -> bool:
    """Whether Ray and Serve's controller still answer."""
    try:
        return APP_NAME in ray_serve.status().applications
    except CONNECTION_ERRORS:
        return False


def served_model() -> ModelInfo:
    """The model of the running application."""
    info: ModelInfo = _handle(WORKER).info.remote().result(timeout_s=30)
    return info


def _handle(deployment: str) -> DeploymentHandle:
    return ray_serve.get_deployment_handle(deployment, APP_NAME)
