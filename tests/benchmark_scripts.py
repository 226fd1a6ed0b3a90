"""Benchmark scripts in the test's own process: `main` with a command line, without the start of another Python and torch."""

import contextlib
import importlib
import io
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.paths import REPOSITORY

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *arguments: str) -> Answer:
    """`python benchmarks/<name>.py <arguments>`, which must return from its `main`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        signal_handlers_kept(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.syspath_prepend(REPOSITORY / "benchmarks")  # as when Python runs a script: its neighbours are found
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        returncode = importlib.import_module(name).main()
    return Answer(returncode, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """What a command or a script sets for its whole process ends with the block."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
