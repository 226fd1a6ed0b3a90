"""One ledger for all: rates and figures."""

from serve.cluster.coordinator import Ledger


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_has_one_rate_whoever_counts() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    assert ledger.take("shop", 60, 60) == 0.0
    wait_s = ledger.take("shop", 60, 30)
    assert 29 < wait_s <= 30
    assert ledger.take("other", 60, 30) == 0.0
    clock.now = wait_s
    assert ledger.take("shop", 60, 30) == 0.0


def test_the_latest_report_counts_and_the_dead_are_forgotten() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ledger.report("drawer-b", "old")
    ledger.report("drawer-a", "a")
    clock.now = 3.0
    ledger.report("drawer-b", "new")
    assert ledger.reports() == {"drawer-a": "a", "drawer-b": "new"}
    clock.now = 6.0
    assert ledger.reports() == {"drawer-b": "new"}
    clock.now = 60.0
    assert ledger.reports() == {}
