"""Arguments of the Ray Serve application: what one server is (serve/settings.py), and how many processes share it.

They stand under `args:` in configs/serve.yaml and configs/kuberay.yaml, and `python -m serve --config` reads the same
file.

No torch, no ray.
"""

from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, model_validator

from engine.config_files import as_input_error, read_config_file
from engine.errors import InputError
from serve.settings import ServeSettings


class AppArguments(ServeSettings):
    """A server on Ray Serve."""

    num_workers: int = Field(1, ge=1, description="processes that draw, each with its copy of the model")
    max_workers: int = Field(0, ge=0, description="more are started under load, up to so many; 0: none")
    target_share: float = Field(0.75, gt=0, le=1, description="of all slots that the autoscaler wants in use")
    scale_up_after_s: float = Field(10.0, ge=0, description="of a load that wants more workers")
    scale_down_after_s: float = Field(300.0, ge=0, description="of a load that wants fewer")
    num_api_servers: int = Field(1, ge=1, description="processes that speak HTTP; one feeds several workers")
    cpus_per_worker: float = Field(1.0, gt=0, description="cores that Ray counts for one, and threads it computes with")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="1/2: two share a card; null: one where the cluster has GPUs and device is not cpu"
    )

    @model_validator(mode="after")
    def _range_of_workers(self) -> "AppArguments":
        if 0 < self.max_workers < self.num_workers:
            raise ValueError("max_workers must be 0, or num_workers and more")
        return self

    def settings(self) -> ServeSettings:
        """Without what says how many: a change of that restarts nobody."""
        return ServeSettings(**{name: getattr(self, name) for name in ServeSettings.model_fields})


def read_arguments(values: dict[str, Any], *, source: str) -> AppArguments:
    """Raises InputError: an unknown field, or a value that does not fit, by name; `source` says where it was read."""
    try:
        return AppArguments.model_validate(values)
    except ValidationError as error:
        raise as_input_error(error, source) from error


def read_serve_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Ray Serve config file with one application -> its `args` and its `http_options`.

    Raises:
        InputError: no such file, no YAML, or not one application.
    """
    tree = read_config_file(path, example="configs/serve.yaml")
    applications = tree.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise InputError("--config", path, "must have `applications:` with one application")
    args, options = applications[0].get("args") or {}, tree.get("http_options") or {}
    if not isinstance(args, dict) or not isinstance(options, dict):
        raise InputError("--config", path, "`args` and `http_options` must hold `key: value` lines")
    return cast(dict[str, Any], args), cast(dict[str, Any], options)
