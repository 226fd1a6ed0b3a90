"""An operator's hand on a running `python -m serve`: deploys its application once more, with other arguments.

    python -m serving.deployer '{"model": …, "num_workers": 1}'

Attaches to the Ray whose address and token file the environment names (see `operator_environment`), as `serve deploy`
would over the dashboard, which such a server does not have. Returns when the application runs as asked.
"""

import json
import sys
import time
from collections.abc import Mapping

import psutil  # type: ignore[import-untyped]
from machine_facts import child_environment

from serve.cluster.ray_environment import ONE_MACHINE_ENVIRONMENT, SERVE_ENVIRONMENT


def operator_environment(raylet: psutil.Process) -> dict[str, str]:
    """What this script needs to attach to the Ray that a raylet belongs to."""
    (address,) = [part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--gcs-address=")]
    told: Mapping[str, str] = raylet.environ()
    return {
        **child_environment(),
        **SERVE_ENVIRONMENT,
        **ONE_MACHINE_ENVIRONMENT,
        "RAY_ADDRESS": address,
        "RAY_AUTH_TOKEN_PATH": told["RAY_AUTH_TOKEN_PATH"],
    }


def main() -> None:
    import ray
    from ray import serve as ray_serve

    from serve.app import APP_NAME, build

    ray.init(namespace="serve", log_to_driver=False)
    begun = time.perf_counter()
    ray_serve.run(build(json.loads(sys.argv[1])), name=APP_NAME, route_prefix="/")
    print(json.dumps({"seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
