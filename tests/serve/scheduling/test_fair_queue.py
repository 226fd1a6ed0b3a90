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
def test_no_waiting_flow_gets_ahead_by_more_than_a_turn_of_each(costs: list[int], num_turns: int) -> None:
    queue: FairQueue[str] = FairQueue()
    names = [str(index) for index in range(len(costs))]
    for name in names:
        queue.add(name, name)
    served = dict.fromkeys(names, 0)
    for _ in range(num_turns):
        first = queue.first()
        assert first is not None
        queue.charge(first, costs[int(first)])
        served[first] += costs[int(first)]
        for one, other in itertools.combinations(names, 2):
            assert abs(served[one] - served[other]) <= costs[int(one)] + costs[int(other)]


def test_a_new_flow_waits_one_turn_of_each_however_much_was_served_before() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b", "c"):
        queue.add(name, name)
    for _ in range(3000):
        serve(queue, 5)
    queue.add("new", "new")
    assert "new" in [serve(queue, 5) for _ in range(4)]


class StartTagClock(FairQueue[str]):
    """The paper's clock: a new flow gets the tag at which the latest turn started."""

    def charge(self, name: str, cost: float) -> None:
        before, (tag, _) = self._clock, self._heap.order(name)
        super().charge(name, cost)
        self._clock = max(before, tag)


def turns_of_an_old_flow(queue: FairQueue[str], *, num_turns: int) -> int:
    """Turns of a long flow beside three one-turn flows, each replaced by a new one when it is served."""
    queue.add("old", "old")
    new_flows, turns = itertools.count(), 0
    for _ in range(num_turns):
        while len(queue) < 4:
            name = f"new {next(new_flows)}"
            queue.add(name, name)
        name = serve(queue, 1)
        turns += name == "old"
        if name != "old":
            queue.discard(name)
    return turns


def test_an_endless_stream_of_new_flows_leaves_an_old_flow_its_share() -> None:
    assert 245 <= turns_of_an_old_flow(FairQueue(), num_turns=1000) <= 255
    assert turns_of_an_old_flow(StartTagClock(), num_turns=1000) == 1  # the reason for the end tag


def test_removing_and_adding_a_flow_again_gains_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("stays", "stays")
    queue.add("returns", "returns")
    served = {"stays": 0, "returns": 0}
    for _ in range(100):
        name = serve(queue, 1)
        served[name] += 1
        if name == "returns":
            queue.discard("returns")
            queue.add("returns", "returns")
    assert served["returns"] <= served["stays"] + 1


def test_in_turn_lists_flows_in_the_order_of_their_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b", "c"):
        queue.add(name, name)
    serve(queue, 7)
    listed = [name for _, _, name in queue.in_turn()]
    assert listed == ["b", "c", "a"]
    assert [serve(queue, 7) for _ in range(3)] == listed


def test_a_name_is_added_once() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a", "a")
    with pytest.raises(ValueError, match="in the queue already"):
        queue.add("a", "a")
    queue.discard("a")
    queue.discard("a")
    assert queue.first() is None
    assert len(queue) == 0
