"""The state around a capture of a CUDA graph. The captures themselves are tested with what they capture."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.cuda_graphs import capturing


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_during_a_capture_and_restored_after_a_fault_too(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def capture(graph: Any, **options: Any) -> Iterator[None]:
        requested.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    graph: Any = object()
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with capturing(graph, pool=7):
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError), capturing(graph):
            raise ZeroDivisionError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert requested == [{"capture_error_mode": "thread_local", "pool": 7}, {"capture_error_mode": "thread_local"}]
