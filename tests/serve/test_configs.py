"""The configs for Ray Serve and Kubernetes, checked against their schemas, our arguments and the code's assumptions."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from serve.api.listener import listener
from serve.arguments import AppArguments, HttpOptions, read_arguments, read_http_options, read_serve_config
from serve.cluster.ray_environment import CLUSTER_ENVIRONMENT, SERVE_ENVIRONMENT
from tests.paths import REPOSITORY

CONFIGS = REPOSITORY / "configs"
KUBERNETES = "1.34"
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def documents() -> list[Tree]:
    return list(yaml.safe_load_all((CONFIGS / "kuberay.yaml").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def service(documents: list[Tree]) -> Tree:
    (one,) = [document for document in documents if document["kind"] == "RayService"]
    return one


@pytest.fixture(scope="module")
def schema() -> Tree:
    tree: Tree = json.loads((REPOSITORY / "tests/data/kuberay_rayservice.schema.json").read_text(encoding="utf-8"))
    return tree


def pods(service: Tree) -> Iterator[Tree]:
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "Pod"} | group["template"]


def containers(service: Tree) -> Iterator[Tree]:
    for pod in pods(service):
        yield from pod["spec"]["containers"]


def serve_configs(service: Tree) -> dict[str, Tree]:
    return {
        "serve.yaml": yaml.safe_load((CONFIGS / "serve.yaml").read_text(encoding="utf-8")),
        "kuberay.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_ray_serve_accepts_the_config_and_we_accept_its_args(service: Tree, name: str) -> None:
    tree = serve_configs(service)[name]
    config = ServeDeploySchema.model_validate(tree)
    (application,) = config.applications
    assert application.import_path == "serve.app:build"
    arguments = read_arguments(application.args, source=name)
    assert arguments.model_fields_set == tree["applications"][0]["args"].keys()


def test_a_server_that_other_machines_can_reach_has_keys(service: Tree) -> None:
    for name, tree in serve_configs(service).items():
        arguments = read_arguments(tree["applications"][0]["args"], source=name)
        assert tree["http_options"]["host"] == "127.0.0.1" or arguments.keys_file, name


def test_our_command_reads_the_same_file() -> None:
    args, options = read_serve_config(CONFIGS / "serve.yaml")
    assert read_arguments(args, source="serve.yaml") == AppArguments()
    assert read_http_options(options, source="serve.yaml") == HttpOptions()


def test_idle_connections_outlive_those_of_proxies(service: Tree) -> None:
    for name, tree in serve_configs(service).items():
        assert tree["http_options"]["keep_alive_timeout_s"] >= 75, name
    for seconds in (HttpOptions().keep_alive_timeout_s, 620):
        server = listener(lambda *_: None, host="127.0.0.1", port=0, drain_s=1, keep_alive_s=seconds)  # type: ignore[arg-type]
        assert server.config.timeout_keep_alive == seconds >= 75
        options = HTTPOptions.model_validate(HttpOptions(keep_alive_timeout_s=seconds).model_dump())
        assert options.keep_alive_timeout_s == seconds


# ---------------------------------------------------------------------------------------------------------- Kubernetes


def test_the_service_matches_kuberays_schema(service: Tree, schema: Tree) -> None:
    jsonschema.validate(service, schema)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(serveConfigV3=""),
        lambda spec: spec["upgradeStrategy"].update(type="Sometimes"),
        lambda spec: spec["rayClusterConfig"].pop("headGroupSpec"),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas="2"),
    ],
)
def test_the_schema_rejects_what_kuberay_would(service: Tree, schema: Tree, change: Any) -> None:
    wrong = json.loads(json.dumps(service))
    change(wrong["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_pods_and_policies_match_kubernetes_schemas(documents: list[Tree], service: Tree) -> None:
    for pod in pods(service):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for document in documents:
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    wrong = json.loads(json.dumps(next(pods(service))))
    wrong["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_no_container_runs_as_root_or_can_become_root(service: Tree) -> None:
    for pod in pods(service):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
    for container in containers(service):
        security = container["securityContext"]
        assert security["runAsNonRoot"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["readinessProbe"]
        assert container["livenessProbe"]


def test_every_container_has_the_environment_that_the_code_relies_on(service: Tree) -> None:
    wanted = SERVE_ENVIRONMENT | CLUSTER_ENVIRONMENT
    set_by_kuberay = {"RAY_AUTH_MODE": service["spec"]["rayClusterConfig"]["authOptions"]["mode"]}
    for container in containers(service):
        assert {entry["name"]: entry["value"] for entry in container["env"]} | set_by_kuberay == wanted


def test_a_pod_has_time_to_drain_and_resources_for_its_worker(service: Tree) -> None:
    arguments = read_arguments(serve_configs(service)["kuberay.yaml"]["applications"][0]["args"], source="kuberay.yaml")
    (worker,) = [pod for pod in pods(service) if pod["metadata"]["labels"]["kodalle.example.com/part"] == "worker"]
    assert worker["spec"]["terminationGracePeriodSeconds"] > arguments.drain_s
    limits = worker["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) >= arguments.cpus_per_worker
    assert float(limits["nvidia.com/gpu"]) >= (arguments.gpus_per_worker or 0)
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == (arguments.num_workers, arguments.max_workers)


def test_the_policies_admit_only_the_declared_port_from_outside(documents: list[Tree], service: Tree) -> None:
    (policy,) = [document for document in documents if document["kind"] == "NetworkPolicy"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for pod in pods(service):
        assert labels.items() <= pod["metadata"]["labels"].items()
    port = serve_configs(service)["kuberay.yaml"]["http_options"]["port"]
    for rule in policy["spec"]["ingress"]:
        is_own = rule["from"] == [{"podSelector": {"matchLabels": labels}}]
        allowed = {entry["port"] for entry in rule.get("ports", [])}
        assert is_own or (allowed and allowed <= {port, 8265})
