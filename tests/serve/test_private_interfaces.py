"""Private interfaces of other packages that serving relies on. A failure names the interface that has changed.

pyproject.toml bounds the versions of these packages from above; raise a bound only when these tests pass.
"""

import inspect
import re
from pathlib import Path

import pytest
import ray
import uvicorn
from ray.serve._private import http_util, replica
from ray.serve.handle import DeploymentHandle
from starlette._utils import get_route_path
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.api.listener import BoundedHttp
from serve.cluster.ray_environment import CLUSTER_ENVIRONMENT, ONE_MACHINE_ENVIRONMENT, SERVE_ENVIRONMENT

RAY = Path(ray.__file__).parent


def test_starlette_get_route_path_strips_the_root_path() -> None:
    """serve/api/middleware.py: access is checked for the path that the router sees."""
    assert get_route_path({"path": "/v1/models"}) == "/v1/models"
    assert get_route_path({"path": "/base/v1/models", "root_path": "/base"}) == "/v1/models"
    assert get_route_path({"path": "/basement", "root_path": "/base"}) == "/basement"


def test_uvicorn_http_protocols_auto_is_the_default() -> None:
    """serve/cluster/gate.py replaces this entry, because Ray names no protocol."""
    assert "auto" in HTTP_PROTOCOLS
    assert uvicorn.Config(lambda: None).http == "auto"


def test_ray_creates_its_proxys_uvicorn_server_without_naming_a_protocol() -> None:
    """serve/cluster/gate.py replaces uvicorn's default protocol in Ray's proxy."""
    calls = re.findall(r"uvicorn\.Config\((.*?)\n        \)", inspect.getsource(http_util), re.DOTALL)
    assert len(calls) == 1
    assert not re.search(r"\bhttp=", calls[0])


@pytest.mark.parametrize(
    "name",
    [
        "connection_made", "connection_lost", "on_message_begin", "on_headers_complete", "data_received",
        "send_400_response", "eof_received", "resume_writing", "on_response_complete", "_start_asgi_task",
    ],
)  # fmt: skip
def test_uvicorn_http_tools_protocol_has_the_overridden_method(name: str) -> None:
    """serve/api/listener.py overrides it."""
    theirs, ours = getattr(HttpToolsProtocol, name), getattr(BoundedHttp, name)
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


@pytest.mark.parametrize("attribute", ["url", "headers", "cycle", "transport", "loop", "flow", "pipeline"])
def test_uvicorn_http_tools_protocol_has_the_attribute(attribute: str) -> None:
    """serve/api/listener.py reads it."""
    assert re.search(rf"self\.{attribute}\b.* = ", inspect.getsource(HttpToolsProtocol))


@pytest.mark.parametrize("attribute", ["transport", "keep_alive", "default_headers", "chunked_encoding"])
def test_uvicorn_request_response_cycle_has_the_attribute(attribute: str) -> None:
    """serve/api/listener.py sets or reads it."""
    assert re.search(rf"self\.{attribute}\b.* = ", inspect.getsource(RequestResponseCycle))


def test_ray_replicas_bind_their_grpc_server_by_a_patchable_function() -> None:
    """serve/cluster/replicas.py replaces it to bind to the node's address instead of all interfaces."""
    assert list(inspect.signature(replica.add_port_to_grpc_server).parameters)[:2] == ["server", "address"]
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)


def test_ray_replicas_build_their_asgi_application_by_a_method() -> None:
    """serve/cluster/replicas.py defines it."""
    assert replica.SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__"


def test_ray_handles_broadcast() -> None:
    """serve/local_ray.py drains all replicas of a deployment."""
    assert list(inspect.signature(DeploymentHandle.broadcast).parameters)[:2] == ["self", "method_name"]


@pytest.mark.parametrize("keyword", ["_node_ip_address", "_temp_dir"])
def test_ray_init_takes_the_private_keyword(keyword: str) -> None:
    """serve/local_ray.py keeps Ray on loopback and its session in a private folder."""
    assert f'kwargs.pop("{keyword}"' in inspect.getsource(ray.init)


def test_ray_reads_every_environment_variable_that_is_set_for_it() -> None:
    """serve/cluster/ray_environment.py: Ray silently ignores a variable that it no longer knows."""
    names = SERVE_ENVIRONMENT.keys() | CLUSTER_ENVIRONMENT.keys() | ONE_MACHINE_ENVIRONMENT.keys()
    files = [path for path in RAY.rglob("*.py") if not {"_private", "_common"}.isdisjoint(path.parts)]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    raylet = (RAY / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    unknown = {name for name in names if name not in text and name.removeprefix("RAY_").encode() not in raylet}
    assert unknown == set()
