"""Worker processes end with the one that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

_JOBS = """
import os, sys, time
from pathlib import Path
from engine.commands.error_lines import _end
from engine.data.workers import ordered_map
import signal

def job(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.02)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    for _ in ordered_map(job, range(10**6), workers=2, title="", progress=False):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_is_left(number: signal.Signals, tmp_path: Path) -> None:
    script, pids = tmp_path / "jobs_of_a_test.py", tmp_path / "pids"
    script.write_text(_JOBS)
    pids.mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, str(script), str(pids)], env=environment) as parent:
        while len(list(pids.iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.02)
        workers = [int(path.name) for path in pids.iterdir()]
        parent.send_signal(number)
        code = parent.wait()
    assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    for _ in range(1000):
        alive = [pid for pid in workers if Path(f"/proc/{pid}/stat").exists() and not _is_zombie(pid)]
        if not alive:
            break
        time.sleep(0.02)
    assert not alive


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
