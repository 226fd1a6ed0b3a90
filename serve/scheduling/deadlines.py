"""Completion times of waiting sequences: the arithmetic behind admission, queue positions and Retry-After.

Times are in decoder steps from now. A sequence occupies its slots for a known number of steps, so slots are released at
known times, and only the seconds per step are an estimate.

    slot 0  ████████░░░░░░░░      releases = [4, 8, 8]: the 1st waiting slot's worth starts at step 4, the 2nd and 3rd
    slot 1  ████░░░░░░░░░░░░      at 8, the 4th when the one that started at 4 has finished
    slot 2  ████████░░░░░░░░
"""

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """The waiting sequences of one request."""

    request_id: str
    num_sequences: int
    slots_per_sequence: int
    steps_per_sequence: int
    is_first: bool  # none of its sequences has a slot yet


@dataclass(frozen=True)
class KeyLoad:
    """The waiting work of one key."""

    work: float  # slot-steps
    deadline: float  # the earliest of its waiting requests
    reserve: float = 0.0  # slot-steps kept free for another key that may arrive


def steps_until_granted(releases: Sequence[int], num_slots: float, *, sequence_steps: int, widest_sequence: int) -> int:
    """Steps until the last of `num_slots` waiting slots' worth of sequences gets its slots, in any order.

    Exact when each sequence takes one slot and `sequence_steps`. A sequence of w slots may leave w - 1 of them idle while
    it waits for the last one, so the w - 1 earliest releases are not counted.

    Args:
        releases: steps until each slot is free, ascending, 0 for free ones.
    """
    if num_slots <= 0:
        return 0
    usable = releases[min(widest_sequence, len(releases)) - 1 :]
    waves, place = divmod(math.ceil(num_slots) - 1, len(usable))
    return usable[place] + waves * sequence_steps


def served_until(work: Sequence[float], *, turn: float) -> list[float]:
    """The total work served until each flow has finished all its work, under fair queueing.

        served_j = work_j + sum over i != j of min(work_i, work_j + 2 * turn)

    No flow gets further ahead of j than a turn of each (serve/scheduling/fair_queue.py), nor more than its own work.
    """
    ordered = sorted(work)
    sums = [0.0, *itertools.accumulate(ordered)]
    served = []
    for amount in work:
        bound = amount + 2 * turn
        num_below = bisect.bisect_right(ordered, bound)  # including itself
        served.append(sums[num_below] + (len(ordered) - num_below) * bound)
    return served


def latest_end_s(
    loads: Sequence[KeyLoad], releases: Sequence[int], *, step_s: float, sequence_steps: int, widest_sequence: int
) -> float:
    """Seconds from now until a key's last sequence is finished, minus its deadline: the maximum over all keys."""
    served = served_until([load.work for load in loads], turn=widest_sequence * sequence_steps)
    latest = -math.inf
    for load, amount in zip(loads, served, strict=True):
        slots = (amount + load.reserve) / sequence_steps
        steps = steps_until_granted(releases, slots, sequence_steps=sequence_steps, widest_sequence=widest_sequence)
        latest = max(latest, step_s * (steps + sequence_steps) - load.deadline)
    return latest


def first_grants(
    keys: Sequence[tuple[float, float, Sequence[tuple[float, float, Waiting]]]],
    running: Sequence[tuple[int, int]],
    *,
    num_free: int,
) -> dict[str, tuple[int, int]]:
    """Simulates the queue until the first sequence of every request has been granted.

    Args:
        keys: (tag, arrival, requests) of each key in queue order; requests likewise.
        running: (steps left, slots) of each sequence in flight.

    Returns:
        For each request without a sequence in flight: its position, from 1, and the steps until its first grant.
    """
    releases = sorted((left, slots) for left, slots in running)  # a sorted list is a heap, and so are the two below
    lanes = [(tag, arrival, [(*turn, turn[2].num_sequences) for turn in requests]) for tag, arrival, requests in keys]
    num_unplaced = sum(waiting.is_first for _, _, requests in keys for _, _, waiting in requests)
    places: dict[str, tuple[int, int]] = {}
    now = 0
    while len(places) < num_unplaced:
        key_tag, key_arrival, requests_left = lanes[0]
        tag, arrival, waiting, sequences_left = requests_left[0]
        while num_free < waiting.slots_per_sequence:
            now, slots = heapq.heappop(releases)
            num_free += slots
        num_free -= waiting.slots_per_sequence
        heapq.heappush(releases, (now + waiting.steps_per_sequence, waiting.slots_per_sequence))
        if waiting.is_first and waiting.request_id not in places:
            places[waiting.request_id] = (len(places) + 1, now)
        cost = waiting.slots_per_sequence * waiting.steps_per_sequence
        if sequences_left > 1:
            heapq.heapreplace(requests_left, (tag + cost, arrival, waiting, sequences_left - 1))
        else:
            heapq.heappop(requests_left)
        if requests_left:
            heapq.heapreplace(lanes, (key_tag + cost, key_arrival, requests_left))
        else:
            heapq.heappop(lanes)
    return places
