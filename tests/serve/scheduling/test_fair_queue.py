import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduling.fair_queue import FairQueue


def serve(queue: FairQueue[str], cost: float) -> str:
    name = queue.first()
    assert name is not None
    queue.charge(name, cost)
    return name


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(2, 80))
def test_nobody_who_waits_gets_ahead_by_more_than_a_turn_of_each(costs: list[int], num_turns: int) -> None:
    queue: FairQueue[str] = FairQueue()
    names = [str(index) for index in range(len(costs))]
    for name in names:
        queue.join(name, name)
    served = dict.fromkeys(names, 0)
    for _ in range(num_turns):
        name = queue.first()
        assert name is not None
        queue.charge(name, costs[int(name)])
        served[name] += costs[int(name)]
        for one, other in itertools.combinations(names, 2):
            assert abs(served[one] - served[other]) <= costs[int(one)] + costs[int(other)]


def test_a_newcomer_waits_one_turn_of_each_however_much_was_served_before() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b", "c"):
        queue.join(name, name)
    for _ in range(3000):
        serve(queue, 5)
    queue.join("new", "new")
    assert "new" in [serve(queue, 5) for _ in range(4)]


class ClockOfTheStart(FairQueue[str]):
    """The paper's clock: newcomers get the tag at which the latest turn started."""

    def charge(self, name: str, cost: float) -> None:
        before, (tag, _) = self._clock, self._heap.order(name)
        super().charge(name, cost)
        self._clock = max(before, tag)


def turns_of_an_old_flow(queue: FairQueue[str], *, num_turns: int) -> int:
    """Beside it three one-turn flows wait at any moment, a new one for each that leaves."""
    queue.join("old", "old")
    newcomers, turns = itertools.count(), 0
    for _ in range(num_turns):
        while len(queue) < 4:
            name = f"new {next(newcomers)}"
            queue.join(name, name)
        name = serve(queue, 1)
        turns += name == "old"
        if name != "old":
            queue.leave(name)
    return turns


def test_an_endless_stream_of_newcomers_leaves_an_old_flow_its_share() -> None:
    assert 245 <= turns_of_an_old_flow(FairQueue(), num_turns=1000) <= 255
    assert turns_of_an_old_flow(ClockOfTheStart(), num_turns=1000) == 1  # why the clock is the end


def test_leaving_and_returning_gains_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.join("stays", "stays")
    queue.join("returns", "returns")
    served = {"stays": 0, "returns": 0}
    for _ in range(100):
        name = serve(queue, 1)
        served[name] += 1
        if name == "returns":
            queue.leave("returns")
            queue.join("returns", "returns")
    assert served["returns"] <= served["stays"] + 1


def test_turns_are_listed_in_the_order_in_which_they_come() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b", "c"):
        queue.join(name, name)
    serve(queue, 7)
    listed = [name for _, _, name in queue.in_turn()]
    assert listed == ["b", "c", "a"]
    assert [serve(queue, 7) for _ in range(3)] == listed


def test_a_name_joins_once() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.join("a", "a")
    with pytest.raises(ValueError, match="waits already"):
        queue.join("a", "a")
    queue.leave("a")
    queue.leave("a")
    assert queue.first() is None
    assert len(queue) == 0
