"""Child processes of tests, forked from a server that has imported the engine once: no seconds of imports for each."""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_GROUP_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# With what `deepspeed.initialize` imports at its first call, torch's compiler above all: 3 s of one core.
DEEPSPEED = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"]
Job = tuple[Callable[..., None], tuple[Any, ...]]  # a function of a test module, and its arguments


def run_forked(
    jobs: Sequence[Job], folder: Path, *, preload: list[str], timeout_s: float = 300
) -> list[tuple[int, str]]:
    """Runs jobs side by side, none of them in a process group.

    Args:
        folder: for what they print.
        preload: modules that the server imports, if this call is the first of the session and starts it.

    Returns:
        Exit code (negative: the signal that killed it) and printed text of each.
    """
    files = [folder / f"job-{number}.txt" for number in range(len(jobs))]
    children = [fork(job, file, preload=preload) for job, file in zip(jobs, files, strict=True)]
    try:
        for child in children:
            child.join(timeout_s)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
    return [
        (int(child.exitcode or 0), file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")
        for child, file in zip(children, files, strict=True)
    ]


def fork(job: Job, output: Path, *, preload: list[str], daemon: bool = True) -> BaseProcess:
    """Starts a job in a process of its own.

    Args:
        output: file for what it prints.
        daemon: it ends with the test process, and may start no processes itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    child = context.Process(target=_run, args=(*job, output), daemon=daemon)
    child.start()
    return child


def _run(function: Callable[..., None], arguments: tuple[Any, ...], output: Path) -> None:
    for name in _GROUP_VARIABLES:
        os.environ.pop(name, None)
    with (
        output.open("w", encoding="utf-8", buffering=1) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            function(*arguments)
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
