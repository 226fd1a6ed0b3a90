"""Training processes that die on purpose: forked from one that has imported everything, with faults at write points."""

import contextlib
import ctypes
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from machine_facts import REPOSITORY
from PIL import Image

SOURCE = Path(__file__).with_name("write_faults.c")
KINDS = ("none", "kill", "disk_full", "io_error", "truncated", "flipped_bit", "zeroed")  # as the library numbers them
_READY = "KODALLE_WRITE_FAULTS"
_LONGEST_S = 300.0


@dataclass(frozen=True)
class WriteFault:
    """Strikes at write point number `at` (1-based) below the run's folder."""

    kind: str
    at: int


@dataclass(frozen=True)
class Ended:
    """How a training process ended; `code` is negative for the signal that killed it."""

    code: int
    printed: str
    struck: bool
    write_points: int
    seconds: float


def start_with_faults(build: Path) -> None:
    """Compiles the library into `build` and starts this program again with it; returns in the one that has it."""
    if os.environ.get(_READY):
        return
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("error: cc: not found: install a C compiler; faults are injected below Python")
    library = build / "write_faults.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"], check=True
    )
    environment = os.environ | {_READY: "1", "LD_PRELOAD": str(library), "DS_ACCELERATOR": "cpu"}
    os.execve(sys.executable, [sys.executable, *sys.argv, "--build", str(build)], environment)


def import_training() -> None:
    """What a training imports until its first step: children find it in memory."""
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "engine.training.stage_kodalle"):
        importlib.import_module(name)
    Image.init()
    getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__")  # noqa: B009 (asks the compiler, once)
    # Half of the time of such a run, and what it measures is not the matter here.
    setattr(importlib.import_module("engine.training.trainer"), "matrix_peak", lambda *_: 1e12)  # noqa: B010 (mypy)


def train(
    config: Path,
    run: Path,
    *overrides: str,
    fault: WriteFault | None = None,
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[int], None] | None = None,
) -> Ended:
    """`engine/train.py --config CONFIG run=RUN …` in a forked process.

    Args:
        fault: of the writes below the run's folder.
        before: called in the process first.
        meanwhile: called here with its process id while it works.
    """
    output, fired, counted = (run.with_name(f"{run.name}.{name}") for name in ("txt", "fired", "counted"))
    for path in (output, fired, counted):
        path.unlink(missing_ok=True)
    arguments = [str(REPOSITORY / "engine/train.py"), "--config", str(config), f"run={run}", *overrides]
    started_s = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(arguments, run, output, fired, counted, fault, before)
    if meanwhile is not None:
        meanwhile(pid)
    code = _wait(pid)
    return Ended(
        code=code,
        printed=output.read_text(encoding="utf-8", errors="replace") if output.exists() else "",
        struck=fired.exists(),
        write_points=int(counted.read_text()) if counted.exists() else 0,
        seconds=time.monotonic() - started_s,
    )


def _child(
    arguments: list[str],
    run: Path,
    output: Path,
    fired: Path,
    counted: Path,
    fault: WriteFault | None,
    before: Callable[[], None] | None,
) -> None:
    """Never returns."""
    code = 1
    try:
        with output.open("w", encoding="utf-8", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            if before is not None:
                before()
            library = ctypes.CDLL(None)
            kind, at = (KINDS.index(fault.kind), fault.at) if fault is not None else (0, 0)
            library.fault_arm(f"{run}/".encode(), ctypes.c_long(at), kind, str(fired).encode())
            sys.argv = arguments
            try:
                runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            counted.write_text(str(library.fault_count()))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    limit_s = time.monotonic() + _LONGEST_S
    while time.monotonic() < limit_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    raise TimeoutError(f"a training has not ended within {_LONGEST_S:g} s")
