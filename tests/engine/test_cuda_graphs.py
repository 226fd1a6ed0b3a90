"""What surrounds a capture; the captures themselves are tested with what they capture."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.cuda_graphs import capturing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_inside_and_is_as_before_after_a_fault_too(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def capture(graph: Any, **options: Any) -> Iterator[None]:
        asked.append(options)
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
    assert asked == [{"capture_error_mode": "thread_local", "pool": 7}, {"capture_error_mode": "thread_local"}]
