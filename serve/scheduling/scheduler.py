"""Which row of which request owns which slots, and which requests are taken on at all.

Plain Python: no torch, no ray, no threads and no clock of its own. One thread calls it, `now` in seconds of any clock
that never goes back. It knows numbers, not slots by name: the decoder seats the rows that `grant` hands out.

Order. Rows are handed out by start-time fair queueing (serve/scheduling/fair_queue.py) in two levels: between keys, then between a
key's requests; a row costs slots_per_sequence * steps_per_sequence. A key with a hundred requests holds up another by one row,
and so does a request of 64 rows one of a single row. A request keeps its place until its last row is handed out.

Wide rows. A guided row takes two slots. When the next row in order does not fit, nothing behind it is handed out: it
keeps the free slot until there is a second. Narrow rows that overtook it could do so for ever, one for each slot that
comes free; as it is, nobody who comes later gets before it, since newcomers stand behind everyone's next turn. The
price is at most slots_per_sequence - 1 idle slots while a wide row is next: 1 of 32.

Admission. Two bounds, both checked before anything is promised.
- Rows: what cannot be seated at once counts as queued, and no more than `max_queued_sequences` may be. A key that holds less
  than its equal part of that (max_queued_sequences / keys that wait) is let in all the same: else one key that floods the
  queue would shut out the others, and the order would be fair among its own requests only. With K keys waiting this
  adds up to at most max_queued_sequences * (1 + 1/2 + ... + 1/K).
- Deadlines: with the newcomer in, every key that has waiting rows must still be through before the earliest deadline of
  its own waiting requests:

      now + SAFETY * step_s * (steps_until_granted(slots_j) + steps_per_sequence) <= deadline_j
      slots_j = (work_j + sum over other keys i of min(work_i, work_j + 2 rows)) / steps_per_sequence

  work: slot-steps that wait; slots_j: what fair sharing hands out until key j has all (serve/scheduling/deadlines.py). It holds for
  any order inside a key, so requests that come later cannot make an earlier one miss. A key that waits already is
  counted once more, as a neighbour with as much work: so it leaves room for another key to come, which must not be
  refused because the first one filled all the time there is. An idle worker takes anything: what it knows of its speed
  may be out of date, and only a step can teach it better.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from serve.scheduling.deadlines import KeyLoad, Waiting, first_rows, latest_end_s, steps_until_granted
from serve.scheduling.fair_queue import FairQueue
from serve.scheduling.keyed_heap import KeyedHeap
from serve.scheduling.step_times import StepTimes

SAFETY = 1.5  # a promise holds while steps take up to this many times as long as when it was given
MIN_RETRY_S, MAX_RETRY_S = 1.0, 120.0  # OpenAI's client sleeps as told up to 120 s, and gives up above


@dataclass(frozen=True)
class Ticket:
    """A request as the scheduler sees it."""

    request_id: str
    key_id: str
    num_rows: int
    slots_per_sequence: int  # 2 when guided
    steps_per_sequence: int
    deadline: float  # on the caller's clock: when its last row must be drawn


@dataclass(frozen=True)
class RowGrant:
    """A row that joins now. A request's rows are granted in order."""

    request_id: str
    row: int  # from 0


class Overloaded(Exception):
    """A request that is not taken on now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """As many rows wait as may."""


class DeadlineTooShort(Overloaded):
    """With this request in, it or one that was promised before would end too late."""


@dataclass
class _Request:
    ticket: Ticket
    num_granted: int = 0
    seated: dict[int, int] = field(default_factory=dict)  # row -> the step after which it leaves

    @property
    def num_waiting(self) -> int:
        return self.ticket.num_rows - self.num_granted

    def as_waiting(self) -> Waiting:
        ticket = self.ticket
        return Waiting(
            ticket.request_id,
            self.num_waiting,
            ticket.slots_per_sequence,
            ticket.steps_per_sequence,
            self.num_granted == 0,
        )


@dataclass
class _Key:
    """A key with waiting rows."""

    requests: FairQueue[_Request] = field(default_factory=FairQueue)
    deadlines: KeyedHeap = field(default_factory=KeyedHeap)  # of the requests above
    num_rows: int = 0  # waiting
    work: int = 0  # slot-steps, waiting

    def earliest_deadline(self) -> float:
        name = self.deadlines.first()
        return math.inf if name is None else self.deadlines.order(name)[0]


class Scheduler:
    """The rows of one decoder. `submit`, `row_finished` and `cancel` cost O(log n) in the number of requests n, `grant`
    that for each row; `submit` to a queue besides O(K log K + M log M) in keys that wait and slots.

    Args:
        num_slots: the decoder's.
        max_queued_sequences: rows that may wait besides those that free slots can take.
    """

    def __init__(self, *, num_slots: int, max_queued_sequences: int) -> None:
        if num_slots < 1 or max_queued_sequences < 0:
            raise ValueError(
                f"num_slots {num_slots} must be at least 1, max_queued_sequences {max_queued_sequences} at least 0"
            )
        self.num_slots = num_slots
        self.max_queued_sequences = max_queued_sequences
        self._requests: dict[str, _Request] = {}
        self._deadlines = KeyedHeap()  # of all requests
        self._keys: FairQueue[_Key] = FairQueue()  # those with waiting rows
        self._num_free = num_slots
        self._num_waiting_rows = 0
        self._num_waiting_slots = 0  # that those rows will take
        self._active: dict[str, _Request] = {}  # those with a granted row
        self._steps = 0  # observed so far
        self._step_times = StepTimes(num_slots=num_slots)
        self._longest_row_steps = self._widest_row = 1  # among what waits; kept until nothing does
        self._places: dict[str, tuple[int, int]] | None = None  # None: something changed; see `position`

    @property
    def slots_in_use(self) -> int:
        return self.num_slots - self._num_free

    @property
    def queued_sequences(self) -> int:
        """Rows that are not granted."""
        return self._num_waiting_rows

    @property
    def num_waiting(self) -> int:
        """Requests without a granted row."""
        return len(self._requests) - len(self._active)

    @property
    def num_active(self) -> int:
        """Requests with a granted row."""
        return len(self._active)

    def submit(self, ticket: Ticket, *, now: float) -> None:
        """Takes a request on.

        Raises:
            QueueFull, DeadlineTooShort: see the module's docstring; nothing has changed.
            ValueError: a ticket that can never run, or an id that is here already.
        """
        if min(ticket.num_rows, ticket.slots_per_sequence, ticket.steps_per_sequence) < 1:
            raise ValueError(f"a ticket needs rows, slots and steps: {ticket}")
        if ticket.slots_per_sequence > self.num_slots:
            raise ValueError(f"a row of {ticket.slots_per_sequence} slots never fits {self.num_slots}")
        if ticket.request_id in self._requests:
            raise ValueError(f"request {ticket.request_id} is here already")
        self._check_room(ticket)
        self._check_deadlines(ticket, now=now)
        self._enqueue(_Request(ticket))

    def grant(self, *, now: float) -> list[RowGrant]:
        """The rows that join now; their slots count as taken from here on.

        A request that is past its deadline gets no more rows; it stays known, and `overdue`, until it is cancelled.
        """
        grants = []
        while (key := self._keys.first()) is not None:
            request = key.requests.first()
            assert request is not None  # a key without waiting rows has left the queue
            ticket = request.ticket
            if ticket.deadline < now:
                self._withdraw(request)
                continue
            if ticket.slots_per_sequence > self._num_free:
                break
            grants.append(RowGrant(ticket.request_id, request.num_granted))
            self._seat(key, request)
        return grants

    def row_finished(self, request_id: str, row: int) -> bool:
        """Frees a row's slots.

        Returns:
            Whether it was the last row of its request, which is forgotten then.

        Raises:
            KeyError: the row has no slot, or its request was cancelled.
        """
        request = self._requests[request_id]
        del request.seated[row]
        self._num_free += request.ticket.slots_per_sequence
        self._places = None
        if request.num_waiting or request.seated:
            return False
        self._forget(request)
        return True

    def cancel(self, request_id: str) -> list[int]:
        """Forgets a request at any stage.

        Returns:
            Its rows that sat in slots, which are free now; [] for an unknown id.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        self._withdraw(request)
        self._num_free += len(request.seated) * request.ticket.slots_per_sequence
        self._forget(request)
        return list(request.seated)

    def overdue(self, *, now: float) -> list[str]:
        """Requests past their deadline, waiting or drawn, until the caller cancels them."""
        return self._deadlines.before((now,))

    def observe_step(self, *, seconds: float, rows: int) -> None:
        """Counts a step of the decoder in.

        Args:
            seconds: what a row waits for a step: from the end of the one before, or from when there was something to do.
            rows: slots that were taken, partners of guided rows included.
        """
        self._steps += 1
        self._step_times.observe(seconds=seconds, rows=rows)

    def position(self, request_id: str) -> int | None:
        """Place among the requests without a row, in the order in which they will get their first: 1 is next.

        None for all others. The first question after a change plays the queue forward, for all requests at once, which
        costs O(n log n): ask a few times a second, not after each step.
        """
        place = self._look_ahead().get(request_id)
        return None if place is None else place[0]

    def estimated_wait_s(self, request_id: str, *, now: float) -> float | None:
        """Seconds until a request's first row is granted if nobody else comes, no more than its deadline leaves.

        None before the first measurement, and for requests without a `position`. Costs what that costs.
        """
        place, step_s = self._look_ahead().get(request_id), self._step_times.seconds(self.num_slots)
        if place is None or step_s is None:
            return None
        left_s = self._requests[request_id].ticket.deadline - now
        return max(0.0, min((place[1] - self._steps) * step_s, left_s))

    def _check_room(self, ticket: Ticket) -> None:
        """Raises QueueFull."""
        slots = ticket.num_rows * ticket.slots_per_sequence
        if self._num_waiting_slots + slots <= self._num_free:
            return  # all can be seated at once, none is queued
        key = self._keys.get(ticket.key_id)
        own_rows, num_keys = (0, len(self._keys) + 1) if key is None else (key.num_rows, len(self._keys))
        all_slots = self._num_waiting_slots + slots
        left_over = Fraction(all_slots - self._num_free, all_slots)  # the part that free slots will not take
        queued = math.ceil(left_over * (self._num_waiting_rows + ticket.num_rows))
        own = math.ceil(left_over * (own_rows + ticket.num_rows))
        if queued <= self.max_queued_sequences or own * num_keys <= self.max_queued_sequences:
            return
        excess_slots = min(queued - self.max_queued_sequences, self._num_waiting_rows) * self._widest_row
        steps = steps_until_granted(
            self._releases(), excess_slots, row_steps=self._longest_row_steps, widest_row=self._widest_row
        )
        raise QueueFull(_retry_s(steps * (self._step_times.seconds(self.num_slots) or 0.0)))

    def _check_deadlines(self, ticket: Ticket, *, now: float) -> None:
        """Raises DeadlineTooShort."""
        slots = ticket.num_rows * ticket.slots_per_sequence
        at_once = self._num_waiting_slots + slots <= self._num_free
        step_s = self._step_times.seconds(self.slots_in_use + slots if at_once else self.num_slots)
        if step_s is None or len(self._requests) == 0:
            return
        if at_once:
            late_s = now + SAFETY * step_s * ticket.steps_per_sequence - ticket.deadline
        else:
            late_s = now + latest_end_s(
                self._loads(ticket),
                self._releases(),
                step_s=SAFETY * step_s,
                row_steps=max(self._longest_row_steps, ticket.steps_per_sequence),
                widest_row=max(self._widest_row, ticket.slots_per_sequence),
            )
        if late_s > 0:
            raise DeadlineTooShort(_retry_s(late_s))

    def _loads(self, ticket: Ticket) -> list[KeyLoad]:
        """What waits for each key once the newcomer is in."""
        newcomer = ticket.num_rows * ticket.slots_per_sequence * ticket.steps_per_sequence
        loads = [
            KeyLoad(work=key.work, deadline=key.earliest_deadline())
            for key_id, key in self._keys.items()
            if key_id != ticket.key_id
        ]
        own = self._keys.get(ticket.key_id)
        if own is None:
            return [*loads, KeyLoad(work=newcomer, deadline=ticket.deadline)]
        work = own.work + newcomer
        deadline = min(own.earliest_deadline(), ticket.deadline)
        return [*loads, KeyLoad(work=work, deadline=deadline, room_for_another=work)]

    def _releases(self) -> list[int]:
        """(num_slots) steps until each slot is free, ascending."""
        steps = [0] * self._num_free
        for left, slots in self._states():
            steps += [left] * slots
        return sorted(steps)

    def _states(self) -> list[tuple[int, int]]:
        """(steps left, slots) of each row that has slots."""
        return [
            (max(0, leaves - self._steps), request.ticket.slots_per_sequence)
            for request in self._active.values()
            for leaves in request.seated.values()
        ]

    def _look_ahead(self) -> dict[str, tuple[int, int]]:
        """For each request without a row: its place, and the step at which it gets its first."""
        if self._places is None:
            keys = [
                (tag, arrival, [(own, since, request.as_waiting()) for own, since, request in key.requests.in_turn()])
                for tag, arrival, key in self._keys.in_turn()
            ]
            ahead = first_rows(keys, self._states(), num_free=self._num_free)
            self._places = {name: (place, self._steps + steps) for name, (place, steps) in ahead.items()}
        return self._places

    def _enqueue(self, request: _Request) -> None:
        ticket = request.ticket
        self._requests[ticket.request_id] = request
        self._deadlines.put(ticket.request_id, (ticket.deadline,))
        key = self._keys.get(ticket.key_id)
        if key is None:
            key = _Key()
            self._keys.join(ticket.key_id, key)
        key.requests.join(ticket.request_id, request)
        key.deadlines.put(ticket.request_id, (ticket.deadline,))
        self._longest_row_steps = max(self._longest_row_steps, ticket.steps_per_sequence)
        self._widest_row = max(self._widest_row, ticket.slots_per_sequence)
        self._count_waiting(key, ticket, ticket.num_rows)

    def _seat(self, key: _Key, request: _Request) -> None:
        """Hands the request's next row its slots."""
        ticket = request.ticket
        cost = ticket.slots_per_sequence * ticket.steps_per_sequence
        request.seated[request.num_granted] = self._steps + ticket.steps_per_sequence
        self._active[ticket.request_id] = request
        request.num_granted += 1
        self._num_free -= ticket.slots_per_sequence
        self._keys.charge(ticket.key_id, cost)
        key.requests.charge(ticket.request_id, cost)
        self._count_waiting(key, ticket, -1)
        if not request.num_waiting:
            self._leave_queue(key, ticket)

    def _withdraw(self, request: _Request) -> None:
        """Takes what waits of a request out of the queue."""
        key = self._keys.get(request.ticket.key_id)
        if key is not None and request.ticket.request_id in key.requests:
            self._count_waiting(key, request.ticket, -request.num_waiting)
            self._leave_queue(key, request.ticket)

    def _leave_queue(self, key: _Key, ticket: Ticket) -> None:
        key.requests.leave(ticket.request_id)
        key.deadlines.discard(ticket.request_id)
        if not key.requests:
            self._keys.leave(ticket.key_id)
        if not self._keys:
            self._longest_row_steps = self._widest_row = 1

    def _count_waiting(self, key: _Key, ticket: Ticket, num_rows: int) -> None:
        key.num_rows += num_rows
        key.work += num_rows * ticket.slots_per_sequence * ticket.steps_per_sequence
        self._num_waiting_rows += num_rows
        self._num_waiting_slots += num_rows * ticket.slots_per_sequence
        self._places = None

    def _forget(self, request: _Request) -> None:
        del self._requests[request.ticket.request_id]
        self._active.pop(request.ticket.request_id, None)
        self._deadlines.discard(request.ticket.request_id)
        self._places = None


def _retry_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
