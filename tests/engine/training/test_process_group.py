"""Joining: threads as the environment allows, a free port or one line."""

import os
import socket
from pathlib import Path

import pytest
import torch

from engine.errors import InputError
from engine.training import process_group
from engine.training.process_group import join_world
from tests.forked import DEEPSPEED, run_forked


def _join_at(port: int, size: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    if size == 1:
        assert join_world(torch_threads=1).size == 1
        return
    with pytest.raises(InputError, match=rf"^port: {port}: another program has it: .*--master_port"):
        join_world(torch_threads=1)


@pytest.mark.slow
def test_port_of_another_program(tmp_path: Path) -> None:
    """One process takes another port; several have agreed on theirs, and say so in one line."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        jobs = [(_join_at, (other.getsockname()[1], size)) for size in (1, 2)]
        answers = run_forked(jobs, tmp_path, preload=DEEPSPEED)
    assert [code for code, _ in answers] == [0, 0], answers


@pytest.mark.parametrize(
    ("stated", "local_size", "threads"), [("3", 2, 3), ("2,4", 1, 2), ("", 2, 4), ("many", 1, 8), ("", 16, 1)]
)
def test_threads(stated: str, local_size: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    monkeypatch.setattr(process_group, "fit_to_machine", lambda: 8)
    assert process_group._threads(local_size) == threads


def test_threads_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    join_world(torch_threads=None)
    join_world(torch_threads=5)
    assert chosen == [3, 5]
    assert torch.get_num_threads() == before
