"""What the tests of commands share: trainings in this process."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.commands import stages


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains in this process what a command launches; the stems of the configs. tests/engine/training proves the launcher."""
    from engine.config_files import load_run
    from engine.training import trainer

    configs: list[str] = []

    def train(arguments: Sequence[str], *, num_processes: int) -> int:
        assert num_processes == 1
        configs.append(Path(arguments[0]).stem)
        trainer.train(load_run(Path(arguments[0]), list(arguments[1:])))
        return 0

    monkeypatch.setattr(stages, "launch", train)
    monkeypatch.setattr(trainer, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 1)  # one process is faster than starting two
    return configs
