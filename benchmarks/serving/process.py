"""Servers under test: each a process tree that is started, stopped and measured.

    direct   python -m serve --without-ray      one process
    ray      python -m serve                    Ray's processes, a proxy, an API server, workers
    stock    serving/batch_baseline.py            Ray's processes, a proxy, one replica with @serve.batch

A server prints {"ready": true, "url": …} as the last line of its standard output when it is ready. Processes are ended by
their own ids and never by name, because other users may run Ray on the same machine.
"""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import yaml
from machine_facts import child_environment
from prometheus_client.parser import text_string_to_metric_families

from serve.api.keys import add_key

ServerKind = Literal["direct", "ray", "stock"]

_READY_WITHIN_S = 400.0  # Ray, on a machine that others load
_STOPPED_WITHIN_S = 60.0


class ServerDied(RuntimeError):
    """A server under test ended, or did not become ready; the message holds the end of its output."""


@dataclass(frozen=True)
class Usage:
    """Resource usage of all processes of a server."""

    num_processes: int
    rss_bytes: int  # shared pages count in each process
    own_bytes: int  # unshared pages
    num_files: int  # descriptors
    cpu_s: float


class Server:
    """A running server under test."""

    def __init__(
        self, kind: ServerKind, process: "subprocess.Popen[str]", *, out: Path, log: Path, key_of: dict[str, str]
    ) -> None:
        self.kind, self._process, self._out, self._log = kind, process, out, log
        self.key_of = key_of  # API keys by id; empty: no keys are needed
        self.address = ""

    @property
    def keys(self) -> list[str]:
        return list(self.key_of.values())

    def processes(self) -> list[psutil.Process]:
        """The root process and all its descendants."""
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def usage(self) -> Usage:
        rss_bytes = own_bytes = num_files = num_processes = 0
        cpu_s = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():  # one that ended in between
                memory, times = process.memory_full_info(), process.cpu_times()
                rss_bytes, own_bytes = rss_bytes + memory.rss, own_bytes + memory.uss
                num_files += process.num_fds()
                cpu_s += times.user + times.system
                num_processes += 1
        return Usage(num_processes, rss_bytes, own_bytes, num_files, cpu_s)

    def get(self, path: str, *, timeout_s: float = 30.0) -> str:
        """The body of GET `path`, whatever its status.

        Raises:
            OSError, http.client.HTTPException: no answer.
        """
        parts = urlsplit(self.address)
        with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=timeout_s)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def metric(self, name: str) -> float:
        """The current sum of a metric over all replicas and labels; 0 if no replica has it."""
        families = text_string_to_metric_families(self.get("/metrics"))
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def check(self) -> None:
        """Raises ServerDied if the root process has ended."""
        if self._process.poll() is not None:
            raise ServerDied(f"{self.kind} ended with code {self._process.returncode}:\n{self._tail()}")

    def wait_until_ready(self) -> None:
        """Returns when the server has printed its address; raises ServerDied."""
        ends_at = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < ends_at:
            self.check()
            for line in self._out.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith('{"ready": true'):
                    self.address = str(json.loads(line)["url"])
                    return
            time.sleep(0.1)
        raise ServerDied(f"{self.kind} was not ready after {_READY_WITHIN_S:g} s:\n{self._tail()}")

    def stop(self) -> None:
        """Sends SIGTERM, as an operator would, and kills what is left of the tree after a minute."""
        try:
            processes = self.processes()
        except psutil.NoSuchProcess:
            processes = []
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOPPED_WITHIN_S)
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def errors(self) -> str:
        """Its standard error so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _tail(self) -> str:
        return self.errors()[-4000:]


def end_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that servers in `serving` blocks are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextlib.contextmanager
def serving(kind: ServerKind, arguments: Mapping[str, Any], *, key_names: Sequence[str] = ()) -> Iterator[Server]:
    """A ready server on a free port of this machine while the block runs.

    Start servers one after the other: Ray gives up when its processes are not up after 30 s.

    Args:
        arguments: direct, ray: fields of serve.arguments.AppArguments; stock: arguments of its deployment.
        key_names: ids of API keys to create; stock has none.

    Raises:
        ServerDied: it did not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        key_of = {}
        if key_names and kind != "stock":
            key_of = {name: add_key(folder / "keys.yaml", name, scopes=("generate", "metrics")) for name in key_names}
            arguments = {**arguments, "keys_file": str(folder / "keys.yaml")}
        out, log = stack.enter_context((folder / "out").open("w")), stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen(
            _command(kind, arguments, folder),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            text=True,
            env=child_environment(),  # the same number of threads for all servers
            start_new_session=True,  # Ctrl-C here ends the block, which stops it
        )
        server = Server(kind, process, out=folder / "out", log=folder / "log", key_of=key_of)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def _command(kind: ServerKind, arguments: Mapping[str, Any], folder: Path) -> list[str]:
    if kind == "stock":
        return [sys.executable, "-m", "serving.batch_baseline", json.dumps(dict(arguments))]
    config = {"applications": [{"import_path": "serve.app:build", "args": dict(arguments)}]}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "serve", "--config", str(path), "--port", "0"]
    return [*command, "--without-ray"] if kind == "direct" else command
