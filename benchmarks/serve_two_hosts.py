"""Network partition: a Ray cluster of two hosts that serves from both; one host is cut off, and the other goes on.

    sudo python benchmarks/serve_two_hosts.py --model models/garments --out benchmarks/results/serve_two_hosts

The hosts are network namespaces of this machine (benchmarks/serving/hosts.py): real Ray nodes with addresses, ports and a
link of their own, on shared cores. So the benchmark measures what breaks and for how long, not the speed of two hosts.

    both     requests at each host's own address, from a client on that host: both workers generate, no byte changes
    cut      the link goes down under load; the client is on the host with Ray's head. Bars: 0 lost, no request takes
             more than 20 s longer than before
    other    answers of the host that is cut off, without Ray's head: no bar
    healed   the link is up again and the second host's Ray is restarted: seconds until two workers generate again

The last line is one JSON document.
"""

import argparse
import json
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine_facts import child_environment, print_document, store_served
from sampling.plan import write_random_model
from serving.client import MODEL_FACTS
from serving.fault_load import LoadSpec, Outcomes, parse_outcomes, pipeline_images
from serving.hosts import Host, missing_requirement, two_hosts
from serving.process import end_on_sigterm
from serving.traffic import mixed, with_keys

from engine.facts import facts
from serve.api.keys import add_key
from serve.cluster.ray_environment import CLUSTER_ENVIRONMENT, SERVE_ENVIRONMENT

_GCS_PORT, _HTTP_PORT = 6379, 8000  # in the hosts' own namespaces
_UP_WITHIN_S = 180.0
_STALL_BAR_S = 20.0
_CONCURRENCY = 3
Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    end_on_sigterm()
    if arguments.deploy:
        _deploy(json.loads(arguments.deploy))
        return 0
    if reason := missing_requirement():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    document: Row = {"benchmark": "serve_two_hosts", **facts(torch.device("cpu"))}
    document["config"] = {
        "requests_in_flight": _CONCURRENCY,
        "candidates_per_request": arguments.candidates,
        "cut_for_s": arguments.cut_s,
        "api_servers": arguments.api_servers,
    }
    with tempfile.TemporaryDirectory(prefix="two-") as folder, two_hosts() as (head, worker):
        model = (arguments.model or Path(folder, "model")).resolve()
        if arguments.model is None:
            write_random_model(model, tiny=True)
        cluster = _Cluster(
            head, worker, Path(folder), model, candidates=arguments.candidates, api_servers=arguments.api_servers
        )
        try:
            document["config"]["model"] = cluster.start()
            document["phases"] = cluster.measure(cut_s=arguments.cut_s)
        except (RuntimeError, TimeoutError) as error:
            print(cluster.logs(), file=sys.stderr)
            raise error
    document["is_met"] = all(row.get("is_met", True) for row in document["phases"].values())
    store_served(document, arguments.out, prefix=f"{arguments.api_servers}-api-servers-")
    print_document(document)
    return 0 if document["is_met"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a tiny one with random weights)")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument(
        "--api-servers",
        type=int,
        default=2,
        help="Ray chooses their hosts: a single one may be on the host that is cut off",
    )
    parser.add_argument("--cut-s", type=float, default=45.0, help="seconds for which the link is down")
    parser.add_argument("--out", type=Path, help="folder for the JSON document")
    parser.add_argument("--deploy", help=argparse.SUPPRESS)  # runs on the head: deploys the application
    return parser.parse_args()


def _deploy(args: Row) -> None:
    import ray
    from ray import serve as ray_serve

    from serve.app import APP_NAME, build

    ray.init(namespace="serve", log_to_driver=False)
    ray_serve.start(proxy_location="EveryNode", http_options={"host": "0.0.0.0", "port": _HTTP_PORT})
    ray_serve.run(build(args), name=APP_NAME, route_prefix="/")


class _Cluster:
    """Two Ray nodes and the application on them."""

    def __init__(
        self, head: Host, worker: Host, folder: Path, model: Path, *, candidates: int, api_servers: int
    ) -> None:
        self._head, self._worker, self._folder = head, worker, folder
        self._key = add_key(folder / "keys.yaml", "client", scopes=("generate", "metrics"))
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self._environment = {
            **child_environment(),
            **SERVE_ENVIRONMENT,
            **CLUSTER_ENVIRONMENT,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"{head.address}:{_GCS_PORT}",
            "OMP_NUM_THREADS": "1",
        }
        # A worker needs a core and a host has one, so each host has one worker.
        self._args = {
            "model": str(model),
            "num_workers": 2,
            "num_api_servers": api_servers,
            "num_slots": 16,
            "cpus_per_worker": 1,
            "keys_file": str(folder / "keys.yaml"),
        }
        self._requests = with_keys(mixed(12, seed=9, sizes=(candidates,)), [self._key])
        self._expected = pipeline_images(model, self._requests)

    def start(self) -> Row:
        """Starts Ray on both hosts and the application; returns the facts of its model."""
        self._start_ray(self._head, "--head", f"--port={_GCS_PORT}", "--include-dashboard=false")
        self._start_worker()
        deploying = [sys.executable, str(Path(__file__).resolve()), "--deploy", json.dumps(self._args)]
        self._head.run(deploying, env=self._environment, timeout_s=_UP_WITHIN_S)
        _wait(lambda: len(self._workers(self._head)) == 2 and len(self._workers(self._worker)) == 2)
        model = json.loads(self._read(self._head, "/v1/models"))["data"][0]
        return {name: model[name] for name in MODEL_FACTS}

    def measure(self, *, cut_s: float) -> Row:
        rows: Row = {"both": self._both()}
        rows["cut"], rows["other"] = self._cut(cut_s, usual_s=rows["both"]["head"]["latency_s"]["most"])
        rows["healed"] = self._healed()
        return rows

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-3000:] for path in sorted(self._folder.glob("*.log"))]
        return "\n".join(texts)

    # ---------------------------------------------------------------------------------------------------------- phases

    def _both(self) -> Row:
        loads = self._load_from(self._head, self._worker, seconds=8.0)
        row: Row = {name: one.row() for name, one in zip(("head", "worker"), loads, strict=True)}
        images = self._images_by_worker()
        row["images_by_worker"] = sorted(images.values())
        row["is_met"] = len(images) == 2 and min(images.values()) > 0 and all(_is_right(one) for one in loads)
        return row

    def _cut(self, cut_s: float, *, usual_s: float) -> tuple[Row, Row]:
        cut_at: list[float] = []

        def cut() -> None:
            _wait(lambda: all(self._started_file(host).exists() for host in (self._head, self._worker)))
            time.sleep(5.0)
            cut_at.append(time.monotonic())
            self._head.cut()

        api_servers_on_head = self._api_servers_on(self._head)
        for host in (self._head, self._worker):
            self._started_file(host).unlink()
        cutting = threading.Thread(target=cut)
        cutting.start()
        head, worker = self._load_from(self._head, self._worker, seconds=5.0 + cut_s)
        cutting.join()
        ends = sorted(one.ended_s for one in head.all if one.status == 200 and one.ended_s > cut_at[0])
        gaps = [after - before for before, after in zip([cut_at[0], *ends], ends, strict=False)]
        slow_s = [one.ended_s - one.sent_s for one in head.all if one.ended_s > cut_at[0]]
        row = head.row() | {
            "api_servers_on_the_head": api_servers_on_head,
            "in_flight_at_the_cut": sum(one.sent_s < cut_at[0] < one.ended_s for one in head.all),
            "answered_after_the_cut": len(ends),
            "longest_silence_s": max(gaps, default=None),
            "longest_wait_s": max(slow_s, default=None),
            "usual_longest_wait_s": usual_s,
        }
        row["is_met"] = _is_right(head) and row["in_flight_at_the_cut"] > 0 and max(slow_s) <= usual_s + _STALL_BAR_S
        return row, Outcomes([one for one in worker.all if one.ended_s > cut_at[0]], worker.files).row()

    def _healed(self) -> Row:
        started_s = time.monotonic()
        self._head.mend()
        self._worker.kill_all()  # as a service manager does with a Ray that has lost its head
        self._start_worker()
        _wait(lambda: len(self._workers(self._head)) == 2)
        back_s = time.monotonic() - started_s
        loads = self._load_from(self._head, self._worker, seconds=5.0)
        row: Row = {name: one.row() for name, one in zip(("head", "worker"), loads, strict=True)}
        return row | {"two_workers_after_s": back_s, "is_met": all(_is_right(one) for one in loads)}

    # -------------------------------------------------------------------------------------------------------- its parts

    def _start_worker(self) -> None:
        self._start_ray(self._worker, f"--address={self._head.address}:{_GCS_PORT}")

    def _start_ray(self, host: Host, *options: str) -> None:
        temp_dir = self._folder / host.name[-9:]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--num-cpus=1", "--block"]
        command += [
            f"--node-ip-address={host.address}",
            "--disable-usage-stats",
            f"--object-store-memory={128 * 2**20}",
        ]
        if "--head" in options:
            command.append(f"--temp-dir={temp_dir}")
        process = host.start(command, log=self._folder / f"{host.name}.log", env=self._environment)
        log = self._folder / f"{host.name}.log"

        def is_up() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"Ray ended with code {process.returncode} on {host.name}")
            return "Ray runtime started" in log.read_text(errors="replace")

        _wait(is_up)

    def _load_from(self, *hosts: Host, seconds: float) -> list[Outcomes]:
        """Runs a client on each host, at that host's address, concurrently."""
        printed: dict[str, str] = {}

        def client(host: Host) -> None:
            address, started = f"http://{host.address}:{_HTTP_PORT}", str(self._started_file(host))
            spec = LoadSpec(address, self._requests, self._expected, _CONCURRENCY, seconds, started)
            command = [sys.executable, "-m", "serving.fault_load"]
            printed[host.name] = host.run(
                command, env=self._environment, timeout_s=seconds + _UP_WITHIN_S, text=spec.to_json()
            )

        threads = [threading.Thread(target=client, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [parse_outcomes(printed[host.name]) for host in hosts]

    def _started_file(self, host: Host) -> Path:
        return self._folder / f"{host.name}.started"

    def _read(self, host: Host, path: str) -> str:
        """The body of GET `path` for a client on the host; empty without an answer."""
        script = (
            "import sys, urllib.request as u; r = u.Request(sys.argv[1], headers={'authorization': 'Bearer ' + sys.argv[2]}); "
            "print(u.urlopen(r, timeout=5).read().decode())"
        )
        command = [sys.executable, "-c", script, f"http://{host.address}:{_HTTP_PORT}{path}", self._key]
        try:
            return host.run(command, env=self._environment, timeout_s=20)
        except (RuntimeError, subprocess.TimeoutExpired):
            return ""

    def _workers(self, host: Host) -> list[str]:
        return re.findall(r'^kodalle_slots\{replica="(worker-[^"]+)"\}', self._read(host, "/metrics"), re.MULTILINE)

    def _api_servers_on(self, host: Host) -> int:
        """The last part of a replica's name is its process id."""
        names = re.findall(
            r'^kodalle_requests_in_flight\{replica="api-server-[^"]*-(\d+)"\}',
            self._read(host, "/metrics"),
            re.MULTILINE,
        )
        return len(set(host.left_over()) & {int(pid) for pid in names})

    def _images_by_worker(self) -> dict[str, float]:
        pattern = r'^kodalle_images_generated_total\{replica="(worker-[^"]+)"\} (\S+)'
        return {
            name: float(count) for name, count in re.findall(pattern, self._read(self._head, "/metrics"), re.MULTILINE)
        }


def _is_right(outcomes: Outcomes) -> bool:
    row = outcomes.row()
    return bool(row["answered"]) and not (row["lost"] or row["wrong_pixels"] or row["requests_with_two_files"])


def _wait(is_true: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + _UP_WITHIN_S
    while not is_true():
        if time.monotonic() > ends_at:
            raise TimeoutError(f"not within {_UP_WITHIN_S:g} s")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
