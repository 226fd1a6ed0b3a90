import heapq

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduling.deadlines import Waiting, first_grants, served_until, steps_until_granted
from serve.scheduling.fair_queue import FairQueue

STEPS = 10
RELEASES = st.lists(st.integers(0, STEPS), min_size=2, max_size=12).map(sorted)


def simulated(releases: list[int], widths: list[int]) -> int:
    """The step at which the last sequence of a queue, strictly in order, gets its slots: simulated slot by slot."""
    slots, now = list(releases), 0
    heapq.heapify(slots)
    for width in widths:
        now = max(now, *(heapq.heappop(slots) for _ in range(width)))
        for _ in range(width):
            heapq.heappush(slots, now + STEPS)
    return now


@settings(max_examples=150, deadline=None)
@given(RELEASES, st.integers(1, 60))
def test_narrow_sequences_are_granted_at_exactly_the_predicted_step(releases: list[int], num_sequences: int) -> None:
    predicted = steps_until_granted(releases, num_sequences, sequence_steps=STEPS, widest_sequence=1)
    assert predicted == simulated(releases, [1] * num_sequences)


@settings(max_examples=150, deadline=None)
@given(RELEASES, st.lists(st.integers(1, 2), min_size=1, max_size=40))
def test_mixed_sequences_are_granted_no_later_than_predicted_and_at_most_some_waves_sooner(
    releases: list[int], widths: list[int]
) -> None:
    predicted = steps_until_granted(releases, sum(widths), sequence_steps=STEPS, widest_sequence=2)
    assert predicted >= simulated(releases, widths)
    with_all_slots = steps_until_granted(releases, sum(widths), sequence_steps=STEPS, widest_sequence=1)
    assert predicted <= with_all_slots + STEPS * (1 + sum(widths) // len(releases) + 1)


def test_no_waiting_slots_are_granted_at_once() -> None:
    assert steps_until_granted([3, 4], 0, sequence_steps=STEPS, widest_sequence=1) == 0


FLOWS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(FLOWS, st.integers(0, 40))
def test_fair_queueing_serves_no_more_than_predicted_before_a_flow_is_finished(
    flows: list[tuple[int, int]], num_before: int
) -> None:
    """Flows of (sequences, cost of a sequence), predicted after some were served, when some flows are ahead of others."""
    queue: FairQueue[int] = FairQueue()
    left = [num_sequences for num_sequences, _ in flows]
    costs = [cost for _, cost in flows]
    for number in range(len(flows)):
        queue.add(str(number), number)

    def serve() -> int | None:
        flow = queue.first()
        if flow is None:
            return None
        queue.charge(str(flow), costs[flow])
        left[flow] -= 1
        if not left[flow]:
            queue.discard(str(flow))
        return flow

    for _ in range(num_before):
        serve()
    work = [num_sequences * cost for num_sequences, cost in zip(left, costs, strict=True)]
    predicted = served_until(work, turn=max(costs))
    assert max(predicted) <= sum(work) + 1e-9  # no prediction exceeds the total
    served = 0
    while (flow := serve()) is not None:
        served += costs[flow]
        if not left[flow]:
            assert served <= predicted[flow]


def test_a_small_flow_waits_for_its_share_and_not_for_the_whole_queue() -> None:
    assert served_until([1000, 10, 40], turn=1) == [1050, 10 + 12 + 12, 40 + 10 + 42]


def test_positions_and_times_are_those_of_the_simulated_queue() -> None:
    def waiting(name: str, num_sequences: int, *, width: int = 1, is_first: bool = True) -> Waiting:
        return Waiting(name, num_sequences, width, STEPS, is_first)

    keys = [
        (0.0, 0.0, [(0.0, 0.0, waiting("big", 3, is_first=False)), (0.0, 1.0, waiting("small", 1))]),
        (0.0, 1.0, [(0.0, 0.0, waiting("wide", 1, width=2))]),
    ]
    # Slots are released at 4 and 6. big takes the first; wide needs the second and big's again, at 14; then small.
    assert first_grants(keys, [(4, 1), (6, 1)], num_free=0) == {"wide": (1, 14), "small": (2, 24)}
    assert first_grants(keys, [(6, 1)], num_free=1) == {"wide": (1, 10), "small": (2, 20)}
