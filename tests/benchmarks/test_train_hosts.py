"""Training on two hosts: the same losses as on one; what the measured seconds of a link mean."""

from pathlib import Path

import pytest

from tests.paths import REPOSITORY


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")


@pytest.mark.parametrize(
    ("gains", "below"),
    [
        ({"10": 4.0, "100": 0.5}, 46),  # on logarithmic scales two thirds of the way
        ({"10": 4.0, "100": 2.0, "1000": 0.25}, 215),
        ({"10": 0.9, "100": 0.5}, None),
        ({"10": 9.0, "100": 3.0}, 100),  # at the fastest that was measured
    ],
)
def test_the_rate_below_which_compression_pays(gains: dict[str, float], below: float | None) -> None:
    from train_hosts import pays_below

    found = pays_below({rate: {"exact": gain, "power_sgd": 1.0} for rate, gain in gains.items()})
    assert found == (None if below is None else pytest.approx(below, abs=1))


@pytest.mark.soak
def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    from serving.hosts import missing_requirement, two_hosts

    if reason := missing_requirement():
        pytest.skip(reason)
    from train_hosts import hosts_phase

    with two_hosts() as hosts:
        assert hosts_phase(hosts, tmp_path, [0, 2]) == {
            "zero_0": {"equal": True},
            "zero_2": {"equal": True},
            "is_met": True,
        }
