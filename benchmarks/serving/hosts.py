"""Two simulated hosts on one machine: network namespaces with a link between them, and processes inside.

    with two_hosts() as (first, second):
        process = first.start(["python", "-m", …], log=path)      with its own loopback and addresses
        first.cut()                                               the link goes down
        first.mend()

Needs Linux, iproute2 and root: `missing_requirement()` says what is missing. Both hosts share the file system. Processes
are ended by id; namespaces are removed with their links.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_NETWORK = "10.231.7"  # visible only inside the two namespaces


@dataclass
class Host:
    """One namespace."""

    name: str
    link: str  # its end of the veth pair
    address: str
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start(self, command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Starts a command on this host; its output goes to `log`, and it is killed when the hosts are removed."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                self._inside(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], *, env: Mapping[str, str], timeout_s: float, text: str = "") -> str:
        """Runs a command on this host to its end; returns its output.

        Raises:
            RuntimeError: it failed; with the end of its errors.
        """
        done = subprocess.run(
            self._inside(command), input=text, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command[:4]} on {self.name}: {done.stderr[-2000:]}")
        return done.stdout

    def cut(self) -> None:
        _ip("-n", self.name, "link", "set", self.link, "down")

    def limit(self, mbit_per_s: float) -> None:
        """What this host sends goes out at so many Mbit/s."""
        shape = ["rate", f"{mbit_per_s:g}mbit", "burst", "128kb", "latency", "400ms"]
        _call("tc", "-n", self.name, "qdisc", "replace", "dev", self.link, "root", "tbf", *shape)

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", self.link, "up")

    def kill_all(self) -> None:
        """Kills all processes started here, and their children."""
        for process in self.processes:
            tree = []
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                tree = [*root.children(recursive=True), root]
            for one in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=10)
            process.wait()
        self.processes.clear()

    def left_over(self) -> list[int]:
        """Ids of the processes that are still inside."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]


def missing_requirement() -> str:
    """Why network namespaces cannot be created here; empty: they can."""
    if sys.platform != "linux":
        return "needs Linux, for network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2 (the command ip)"
    if os.geteuid() != 0:
        return "needs root, to create network namespaces"
    probe = f"kodalle-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
    except RuntimeError as error:
        return f"network namespaces cannot be created here: {error}"
    _ip("netns", "del", probe)
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that can reach only each other."""
    number = os.getpid()
    hosts = (
        Host(f"kodalle-a{number}", f"ka{number}"[:15], f"{_NETWORK}.1"),
        Host(f"kodalle-b{number}", f"kb{number}"[:15], f"{_NETWORK}.2"),
    )
    created: list[Host] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            created.append(host)
        _ip("link", "add", hosts[0].link, "netns", hosts[0].name, "type", "veth",
            "peer", "name", hosts[1].link, "netns", hosts[1].name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.mend()
        yield hosts
    finally:
        for host in created:
            host.kill_all()
            for pid in host.left_over():  # started inside, and orphaned
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            _ip("netns", "del", host.name)


def _ip(*arguments: str) -> str:
    return _call("ip", *arguments)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
