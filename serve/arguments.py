"""Arguments of the Ray Serve application: the settings of a server (serve/settings.py) and its numbers of processes.

They are the `args:` of configs/serve.yaml and configs/kuberay.yaml; `python -m serve --config` reads the same file.

No torch, no ray.
"""

from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, model_validator

from engine.config.section import Section, as_input_error
from engine.config_files import read_config_file
from engine.errors import InputError
from serve.settings import ServeSettings

# How long an idle connection stays open. Longer than proxies keep theirs (60 s: nginx, AWS's load balancer): a proxy whose
# connection the server closes first sends its next request into the void.
KEEP_ALIVE_S = 75


class HttpOptions(Section):
    """Where the server listens: `http_options:` of a Ray Serve config, with Ray's own names."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: a free one")
    keep_alive_timeout_s: int = Field(
        KEEP_ALIVE_S,
        ge=1,
        description="how long an idle connection stays open: longer than the proxy in front keeps it",
    )


class AppArguments(ServeSettings):
    """A server on Ray Serve."""

    num_workers: int = Field(1, ge=1, description="processes that generate, each with its own copy of the model")
    max_workers: int = Field(0, ge=0, description="upper bound of autoscaling under load; 0: no autoscaling")
    target_share: float = Field(0.75, gt=0, le=1, description="share of all slots that autoscaling keeps in use")
    scale_up_after_s: float = Field(10.0, ge=0, description="seconds of load before workers are added")
    scale_down_after_s: float = Field(300.0, ge=0, description="seconds of low load before workers are removed")
    num_api_servers: int = Field(1, ge=1, description="HTTP processes; one serves several workers")
    cpus_per_worker: float = Field(
        1.0, gt=0, description="cores that Ray reserves for a worker, and its compute threads"
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="0.5: two workers share a GPU; null: one each if the cluster has GPUs and device is not cpu",
    )

    @model_validator(mode="after")
    def _range_of_workers(self) -> "AppArguments":
        if 0 < self.max_workers < self.num_workers:
            raise ValueError("max_workers must be 0, or at least num_workers")
        return self

    def settings(self) -> ServeSettings:
        """The settings without the numbers of processes, so that changing a number restarts no replica."""
        return ServeSettings(**{name: getattr(self, name) for name in ServeSettings.model_fields})


def read_arguments(values: dict[str, Any], *, source: str) -> AppArguments:
    """Validated arguments; raises InputError naming an unknown field or a bad value, and `source`, where it was read."""
    try:
        return AppArguments.model_validate(values)
    except ValidationError as error:
        raise as_input_error(error, source) from error


def read_http_options(values: dict[str, Any], *, source: str) -> HttpOptions:
    """Validated options; raises InputError naming an unknown field or a bad value, and `source`, where it was read."""
    try:
        return HttpOptions.model_validate(values)
    except ValidationError as error:
        raise as_input_error(error, source) from error


def read_serve_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Ray Serve config file with one application -> its `args` and its `http_options`.

    Raises:
        InputError: no such file, no YAML, not one application, or one below a `route_prefix`, which only Ray's own
            commands know.
    """
    tree = read_config_file(path, example="configs/serve.yaml")
    applications = tree.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise InputError("--config", path, "must have `applications:` with one application")
    if applications[0].get("route_prefix", "/") != "/":
        remedy = "must be `/` here; behind a proxy set `root_path` in `args`, or deploy the file with `serve deploy`"
        raise InputError("route_prefix", applications[0]["route_prefix"], remedy)
    args, options = applications[0].get("args") or {}, tree.get("http_options") or {}
    if not isinstance(args, dict) or not isinstance(options, dict):
        raise InputError("--config", path, "`args` and `http_options` must hold `key: value` lines")
    return cast(dict[str, Any], args), cast(dict[str, Any], options)
