"""Threads that the container may use, and the number type that the processor multiplies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device import default_dtype, fit_threads


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.max": "rubbish"}, 2),
        ({}, 2),
    ],
)
def test_a_container_s_share_of_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert fit_threads(tmp_path) == expected
    assert torch.get_num_threads() == expected


def test_threads_are_never_added(tmp_path: Path, threads: int) -> None:
    torch.set_num_threads(1)
    (tmp_path / "cpu.max").write_text("800000 100000")
    assert fit_threads(tmp_path) == 1


@pytest.mark.parametrize(
    ("capabilities", "num_parameters", "expected"),
    [
        ({"avx512_bf16": True}, 335_000_000, torch.bfloat16),
        ({"amx_bf16": True}, 335_000_000, torch.bfloat16),
        ({"avx512_bf16": True}, 5_000_000, torch.float32),
        ({"avx512_vnni": True}, 335_000_000, torch.float32),
        ({}, 335_000_000, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], num_parameters: int, expected: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert default_dtype(torch.device("cpu"), num_parameters) == expected
