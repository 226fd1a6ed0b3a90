"""When waiting rows will have been drawn: the arithmetic behind admission, places in the queue and Retry-After.

All in steps of the decoder, counted from now. Slots are given back at known times, since a row leaves after a known
number of steps, so times need no guess beyond the seconds of a step.

    slot 0  ████████░░░░░░░░      releases = [4, 8, 8]: the 1st waiting slot's worth starts at step 4, the 2nd and 3rd
    slot 1  ████░░░░░░░░░░░░      at 8, the 4th when what started at 4 has left
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
    """Rows of one request that wait."""

    request_id: str
    num_rows: int
    slots_per_sequence: int
    steps_per_sequence: int
    is_first: bool  # no row of it has a slot yet


@dataclass(frozen=True)
class KeyLoad:
    """What waits for one key."""

    work: float  # slot-steps
    deadline: float  # the earliest of its waiting requests
    room_for_another: float = 0.0  # slot-steps that are to stay free for a key that may come


def steps_until_granted(releases: Sequence[int], num_slots: float, *, row_steps: int, widest_row: int) -> int:
    """Steps until the last of `num_slots` waiting slots' worth of rows gets its slots, in whatever order they come.

    Exact when rows take one slot and `row_steps` each. A row of w slots may leave w - 1 idle while it waits for the
    last of them, so that many, the earliest, are left out of account.

    Args:
        releases: steps until each slot is free, ascending, 0 for free ones.
    """
    if num_slots <= 0:
        return 0
    usable = releases[min(widest_row, len(releases)) - 1 :]
    waves, place = divmod(math.ceil(num_slots) - 1, len(usable))
    return usable[place] + waves * row_steps


def served_until(work: Sequence[float], *, turn: float) -> list[float]:
    """How much is served until each flow has all its work, when all share fairly.

        served_j = work_j + sum over i != j of min(work_i, work_j + 2 * turn)

    Nobody gets further ahead of j than a turn of each (serve/scheduling/fair_queue.py), nor gets more than it waits for.
    """
    ordered = sorted(work)
    sums = [0.0, *itertools.accumulate(ordered)]
    served = []
    for amount in work:
        bound = amount + 2 * turn
        num_below = bisect.bisect_right(ordered, bound)  # itself among them
        served.append(sums[num_below] + (len(ordered) - num_below) * bound)
    return served


def latest_end_s(
    loads: Sequence[KeyLoad], releases: Sequence[int], *, step_s: float, row_steps: int, widest_row: int
) -> float:
    """Seconds from now until a key's last row is drawn, less its deadline: of the key where that is most."""
    served = served_until([load.work for load in loads], turn=widest_row * row_steps)
    latest = -math.inf
    for load, amount in zip(loads, served, strict=True):
        slots = (amount + load.room_for_another) / row_steps
        steps = steps_until_granted(releases, slots, row_steps=row_steps, widest_row=widest_row)
        latest = max(latest, step_s * (steps + row_steps) - load.deadline)
    return latest


def first_rows(
    keys: Sequence[tuple[float, float, Sequence[tuple[float, float, Waiting]]]],
    states: Sequence[tuple[int, int]],
    *,
    num_free: int,
) -> dict[str, tuple[int, int]]:
    """Plays the queue forward until each request has its first row.

    Args:
        keys: (tag, arrival, requests) of each key, and of its requests alike, both in turn.
        flights: (steps left, slots) of each row in flight.

    Returns:
        For each request without a row: its place, from 1, and the steps until its first row.
    """
    releases = sorted((left, slots) for left, slots in states)  # a sorted list is a heap, and so are the two below
    lanes = [(tag, arrival, [(*turn, turn[2].num_rows) for turn in requests]) for tag, arrival, requests in keys]
    num_unplaced = sum(waiting.is_first for _, _, requests in keys for _, _, waiting in requests)
    places: dict[str, tuple[int, int]] = {}
    now = 0
    while len(places) < num_unplaced:
        key_tag, key_arrival, requests_left = lanes[0]
        tag, arrival, waiting, rows_left = requests_left[0]
        while num_free < waiting.slots_per_sequence:
            now, slots = heapq.heappop(releases)
            num_free += slots
        num_free -= waiting.slots_per_sequence
        heapq.heappush(releases, (now + waiting.steps_per_sequence, waiting.slots_per_sequence))
        if waiting.is_first and waiting.request_id not in places:
            places[waiting.request_id] = (len(places) + 1, now)
        cost = waiting.slots_per_sequence * waiting.steps_per_sequence
        if rows_left > 1:
            heapq.heapreplace(requests_left, (tag + cost, arrival, waiting, rows_left - 1))
        else:
            heapq.heappop(requests_left)
        if requests_left:
            heapq.heapreplace(lanes, (key_tag + cost, key_arrival, requests_left))
        else:
            heapq.heappop(lanes)
    return places
