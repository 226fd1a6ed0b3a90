"""A tenth of the fault injection: a training that is killed or whose writes are spoiled loses nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.paths import REPOSITORY


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: faults are injected below Python")
def test_a_tenth_of_the_faults_loses_nothing() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "train_faults.py")]
    command += ["--kills", "5", "--faults", "18", "--stops", "1", "--launched", "0"]
    answer = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    document = json.loads(answer.stdout.splitlines()[-1])
    phases = document["phases"]
    assert {name: row["broken_promises"] for name, row in phases.items()} == {name: [] for name in phases}
    assert phases["kills"]["by_kind"] == {"kill": 5}
    assert len(phases["faults"]["by_kind"]) == 9
    assert all(phases["faults"]["by_kind"].values())
    assert phases["faults"]["resumed"] > 9
    assert phases["kills"]["equal_runs"] >= 1
