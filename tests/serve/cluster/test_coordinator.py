"""The coordinator: rate limits and metrics of all processes."""

from serve.cluster.coordinator import Coordinator


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_has_one_rate_limit() -> None:
    clock = Clock()
    coordinator = Coordinator(clock)
    assert coordinator.take("shop", 60, 60) == 0.0
    wait_s = coordinator.take("shop", 60, 30)
    assert 29 < wait_s <= 30
    assert coordinator.take("other", 60, 30) == 0.0
    clock.now = wait_s
    assert coordinator.take("shop", 60, 30) == 0.0


def test_the_latest_report_counts_and_dead_processes_are_dropped() -> None:
    clock = Clock()
    coordinator = Coordinator(clock)
    coordinator.report("worker-b", "old")
    coordinator.report("worker-a", "a")
    clock.now = 3.0
    coordinator.report("worker-b", "new")
    assert coordinator.reports() == {"worker-a": "a", "worker-b": "new"}
    clock.now = 6.0
    assert coordinator.reports() == {"worker-b": "new"}
    clock.now = 60.0
    assert coordinator.reports() == {}
