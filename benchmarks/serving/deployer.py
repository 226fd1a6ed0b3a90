"""Redeploys the application of a running `python -m serve` with other arguments, as an operator would.

    python -m serving.deployer '{"model": …, "num_workers": 1}'

Attaches to the Ray whose address and token file the environment names (see `operator_environment`), as `serve deploy`
does through the dashboard, which such a server does not have. Returns when the new deployment runs.
"""

import json
import sys
import time
from collections.abc import Mapping

import psutil
from machine_facts import child_environment

from serve.cluster.ray_environment import ONE_MACHINE_ENVIRONMENT, SERVE_ENVIRONMENT


def operator_environment(raylet: psutil.Process) -> dict[str, str]:
    """The environment with which this script attaches to the Ray of a raylet."""
    (address,) = [part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--gcs-address=")]
    environment: Mapping[str, str] = raylet.environ()
    return {
        **child_environment(),
        **SERVE_ENVIRONMENT,
        **ONE_MACHINE_ENVIRONMENT,
        "RAY_ADDRESS": address,
        "RAY_AUTH_TOKEN_PATH": environment["RAY_AUTH_TOKEN_PATH"],
    }


def main() -> None:
    import ray
    from ray import serve as ray_serve

    from serve.app import APP_NAME, build

    ray.init(namespace="serve", log_to_driver=False)
    started_s = time.perf_counter()
    ray_serve.run(build(json.loads(sys.argv[1])), name=APP_NAME, route_prefix="/")
    print(json.dumps({"seconds": time.perf_counter() - started_s}))


if __name__ == "__main__":
    main()
