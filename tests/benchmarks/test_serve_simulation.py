"""The simulation of capacity: its clock, and that no request is lost in it."""

import argparse
from collections.abc import Iterator
from typing import Any

import pytest

from tests.paths import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable() -> Iterator[None]:
    """Puts the scripts' folder on the path, as Python does when it runs a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield


def run(plan: Any, *, workers: int = 3, minutes: float = 5.0, **settings: Any) -> Any:
    """The finished simulation of a plan."""
    import serve_simulation

    options: dict[str, Any] = {"slots": 32, "queue": 256, "deadline_s": 120.0} | settings
    arguments = argparse.Namespace(workers=workers, minutes=minutes, **options)
    simulation = serve_simulation.Simulation(plan, arguments, times())
    simulation.row = simulation.run()  # type: ignore[attr-defined]
    return simulation


def times() -> Any:
    import serve_simulation

    return serve_simulation.Times(first_step=0.05, more_step=0.002, prefill=0.4, finish=0.6)


def test_a_request_alone_takes_its_steps_and_what_surrounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import serve_simulation

    monkeypatch.setattr(serve_simulation, "_SIZES", ((1, 1.0),))
    monkeypatch.setattr(serve_simulation, "_MEAN_SIZE", 1.0)
    monkeypatch.setattr(serve_simulation, "_HANG_UP_SHARE", 0.0)
    simulation = run(serve_simulation.Plan("one now and then", 0.003), workers=10, minutes=60)
    took = [request.took_s for request in simulation.requests.values()]
    assert len(took) > 5
    assert sorted(took)[0] == pytest.approx(0.4 + 256 * 0.05 + 0.6)


@pytest.mark.parametrize("fault", ["none", "deaths", "bursts", "ten times the load", "a flood", "autoscaling"])
def test_every_request_ends_and_no_slot_stays_taken(fault: str) -> None:
    import serve_simulation

    plan = {
        "none": serve_simulation.Plan("a", 0.6),
        "deaths": serve_simulation.Plan("b", 0.6, deaths=True),
        "bursts": serve_simulation.Plan("c", 0.6, is_bursty=True),
        "ten times the load": serve_simulation.Plan("d", 10.0),
        "a flood": serve_simulation.Plan("e", 0.5, flood=4.0),
        "autoscaling": serve_simulation.Plan("f", 0.1, workers=1, scales_to=3, load_from_s=(60.0, 0.8)),
    }[fault]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_simulation, "_WORKER_LIFE_S", 200.0)
        simulation = run(plan, minutes=2.0 if plan.load > 1 else 5.0)
    outcomes = simulation.row["outcomes"]
    assert "unanswered" not in outcomes
    assert sum(outcomes.values()) == len(simulation.requests) > 20
    for worker in simulation.workers:
        if worker.is_alive:
            assert (worker.scheduler.slots_in_use, worker.scheduler.queued_sequences, worker.running) == (0, 0, {})
    if fault == "deaths":
        assert simulation.row["reruns"] > 0
    if fault == "ten times the load":
        assert outcomes["refused"] > outcomes["answered"]
    if fault == "a flood":
        keys = simulation.row["keys"]
        assert (
            min(one["answered_share"] for name, one in keys.items() if name != "flood")
            > keys["flood"]["answered_share"]
        )
    if fault == "autoscaling":
        assert simulation.row["autoscaling"]["workers_after"] == 3


def test_equal_scenarios_are_equal() -> None:
    import serve_simulation

    rows = [run(serve_simulation.Plan("again", 0.7, deaths=True)).row for _ in range(2)]
    assert rows[0] == rows[1]


def test_times_are_those_of_the_stored_document() -> None:
    import serve_simulation

    found = serve_simulation.read_times(serve_simulation.STEP_TIMES, "int8")
    assert 256 * (found.first_step + 15 * found.more_step) == pytest.approx(19.00902358700114)
    assert 256 * found.first_step == pytest.approx(12.416417650001677)
    assert 0.4 < found.images_per_s(32) < 1.0
