"""The scheduler of a worker: grants slots to the sequences of requests, and decides which requests are admitted.

Plain Python: no torch, no ray, no threads and no clock of its own. It is not thread-safe: callers hold a lock. `now` is in seconds of
any monotonic clock. It counts slots and does not name them: the decoder allocates them to the granted sequences.

Order. Sequences are granted by start-time fair queueing (serve/scheduling/fair_queue.py) on two levels: between keys, then
between a key's requests; a sequence costs slots_per_sequence * steps_per_sequence. A key with a hundred requests delays
another key by one sequence, and so does a request of 64 sequences one of a single sequence. A request keeps its position
until its last sequence is granted.

Wide sequences. A guided sequence takes two slots. When the next sequence in order does not fit, none behind it is granted:
it reserves the free slot until a second one is released. Otherwise narrow sequences could overtake it for ever, one for
each released slot; this way no later request can, because new flows queue behind every flow's next turn. The price is at
most slots_per_sequence - 1 idle slots while a wide sequence is next: 1 of 32.

Admission. A request is admitted if it passes two checks.
- Queue length: sequences that cannot be granted at once count as queued, up to `max_queued_sequences`. A key with less than
  its equal share of the queue (max_queued_sequences / waiting keys) is admitted all the same: otherwise a key that floods
  the queue would lock out the others, and fair queueing would apply to its own requests only. With K waiting keys the
  total is at most max_queued_sequences * (1 + 1/2 + ... + 1/K).
- Deadlines: with the new request, every key with waiting sequences must still finish before the earliest deadline of its
  own waiting requests:

      now + SAFETY * step_s * (steps_until_granted(slots_j) + steps_per_sequence) <= deadline_j
      slots_j = (work_j + sum over other keys i of min(work_i, work_j + 2 sequences)) / steps_per_sequence

  work: waiting slot-steps; slots_j: what fair queueing grants until key j is finished (serve/scheduling/deadlines.py). The
  bound holds for any order within a key, so later requests cannot make an earlier one miss its deadline. For a key that
  already waits, another key with as much work is assumed: this keeps time free for a further key, which must not be
  refused because the first one used all of it. An idle worker admits any request: its estimate of the step time may be
  outdated, and only a step can correct it.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from serve.scheduling.deadlines import KeyLoad, Waiting, first_grants, latest_end_s, steps_until_granted
from serve.scheduling.fair_queue import FairQueue
from serve.scheduling.keyed_heap import KeyedHeap
from serve.scheduling.step_times import StepTimes
from serve.scheduling.tickets import DeadlineTooShort, Grant, QueueFull, Ticket

SAFETY = 1.5  # admitted deadlines hold while steps take up to this many times the estimate at admission
MIN_RETRY_S, MAX_RETRY_S = 1.0, 120.0  # OpenAI's client obeys Retry-After up to 120 s, and ignores larger values


@dataclass
class _Request:
    ticket: Ticket
    num_granted: int = 0
    running: dict[int, int] = field(default_factory=dict)  # candidate -> the step after which it is finished

    @property
    def num_waiting(self) -> int:
        return self.ticket.num_sequences - self.num_granted

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
    """A key with waiting sequences."""

    requests: FairQueue[_Request] = field(default_factory=FairQueue)
    deadlines: KeyedHeap = field(default_factory=KeyedHeap)  # of the requests above
    num_sequences: int = 0  # waiting
    work: int = 0  # slot-steps, waiting

    def earliest_deadline(self) -> float:
        name = self.deadlines.first()
        return math.inf if name is None else self.deadlines.order(name)[0]


class Scheduler:
    """Slots and queue of one decoder.

    `submit`, `sequence_finished` and `cancel` cost O(log n) for n requests, `grant` that for each sequence; `submit` to a
    queue costs O(K log K + M log M) more for K waiting keys and M slots.

    Args:
        num_slots: the decoder's slots.
        max_queued_sequences: sequences that may wait beyond those that free slots can take.
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
        self._keys: FairQueue[_Key] = FairQueue()  # those with waiting sequences
        self._num_free = num_slots
        self._num_waiting_sequences = 0
        self._num_waiting_slots = 0  # that they will take
        self._active: dict[str, _Request] = {}  # those with a granted sequence
        self._steps = 0  # observed so far
        self._step_times = StepTimes(num_slots=num_slots)
        self._longest_steps = self._widest_sequence = 1  # among the waiting ones; reset when none waits
        self._places: dict[str, tuple[int, int]] | None = None  # None: outdated; see `position`

    @property
    def slots_in_use(self) -> int:
        return self.num_slots - self._num_free

    @property
    def queued_sequences(self) -> int:
        """Sequences that are not granted."""
        return self._num_waiting_sequences

    @property
    def num_waiting(self) -> int:
        """Requests without a granted sequence."""
        return len(self._requests) - len(self._active)

    @property
    def num_active(self) -> int:
        """Requests with a granted sequence."""
        return len(self._active)

    def submit(self, ticket: Ticket, *, now: float) -> None:
        """Admits a request.

        Raises:
            QueueFull, DeadlineTooShort: see the module's docstring; nothing has changed.
            ValueError: a ticket that can never run, or a request id that is known already.
        """
        if min(ticket.num_sequences, ticket.slots_per_sequence, ticket.steps_per_sequence) < 1:
            raise ValueError(f"a ticket needs sequences, slots and steps: {ticket}")
        if ticket.slots_per_sequence > self.num_slots:
            raise ValueError(f"a sequence of {ticket.slots_per_sequence} slots never fits {self.num_slots}")
        if ticket.request_id in self._requests:
            raise ValueError(f"request {ticket.request_id} is known already")
        self._check_room(ticket)
        self._check_deadlines(ticket, now=now)
        self._enqueue(_Request(ticket))

    def grant(self, *, now: float) -> list[Grant]:
        """The sequences that start now; their slots count as taken from here on.

        A request past its deadline gets no more grants; it stays known, and `overdue`, until it is cancelled.
        """
        grants = []
        while (key := self._keys.first()) is not None:
            request = key.requests.first()
            assert request is not None  # a key without waiting sequences is not in the queue
            ticket = request.ticket
            if ticket.deadline < now:
                self._withdraw(request)
                continue
            if ticket.slots_per_sequence > self._num_free:
                break
            grants.append(Grant(ticket.request_id, request.num_granted))
            self._allocate(key, request)
        return grants

    def sequence_finished(self, request_id: str, candidate: int) -> bool:
        """Frees a sequence's slots.

        Returns:
            Whether it was the last sequence of its request, which is forgotten then.

        Raises:
            KeyError: the sequence has no slot, or its request was cancelled.
        """
        request = self._requests[request_id]
        del request.running[candidate]
        self._num_free += request.ticket.slots_per_sequence
        self._places = None
        if request.num_waiting or request.running:
            return False
        self._forget(request)
        return True

    def cancel(self, request_id: str) -> list[int]:
        """Forgets a request at any stage.

        Returns:
            Its candidates that had slots, which are free now; [] for an unknown id.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        self._withdraw(request)
        self._num_free += len(request.running) * request.ticket.slots_per_sequence
        self._forget(request)
        return list(request.running)

    def overdue(self, *, now: float) -> list[str]:
        """Requests past their deadline, waiting or running, until the caller cancels them."""
        return self._deadlines.before((now,))

    def observe_step(self, *, seconds: float, slots: int) -> None:
        """Counts a step of the decoder.

        Args:
            seconds: from the end of the previous step, or from the time at which there was work.
            slots: taken slots, those of unconditional sequences included.
        """
        self._steps += 1
        self._step_times.observe(seconds=seconds, slots=slots)

    def position(self, request_id: str) -> int | None:
        """Position among the requests without a grant, in the order of their first grants: 1 is next.

        None for all others. The first call after a change simulates the queue for all requests, in O(n log n): call it a
        few times a second, not after each step.
        """
        place = self._look_ahead().get(request_id)
        return None if place is None else place[0]

    def estimated_wait_s(self, request_id: str, *, now: float) -> float | None:
        """Seconds until a request's first grant if no further request arrives, at most the time until its deadline.

        None before the first measurement, and for requests without a `position`. As expensive as `position`.
        """
        place, step_s = self._look_ahead().get(request_id), self._step_times.seconds(self.num_slots)
        if place is None or step_s is None:
            return None
        left_s = self._requests[request_id].ticket.deadline - now
        return max(0.0, min((place[1] - self._steps) * step_s, left_s))

    def _check_room(self, ticket: Ticket) -> None:
        """Raises QueueFull."""
        slots = ticket.num_sequences * ticket.slots_per_sequence
        if self._num_waiting_slots + slots <= self._num_free:
            return  # all are granted at once, none is queued
        key = self._keys.get(ticket.key_id)
        own_sequences, num_keys = (0, len(self._keys) + 1) if key is None else (key.num_sequences, len(self._keys))
        all_slots = self._num_waiting_slots + slots
        left_over = Fraction(all_slots - self._num_free, all_slots)  # the part that does not fit into free slots
        queued = math.ceil(left_over * (self._num_waiting_sequences + ticket.num_sequences))
        own = math.ceil(left_over * (own_sequences + ticket.num_sequences))
        if queued <= self.max_queued_sequences or own * num_keys <= self.max_queued_sequences:
            return
        excess_slots = min(queued - self.max_queued_sequences, self._num_waiting_sequences) * self._widest_sequence
        steps = steps_until_granted(
            self._releases(), excess_slots, sequence_steps=self._longest_steps, widest_sequence=self._widest_sequence
        )
        raise QueueFull(_retry_s(steps * (self._step_times.seconds(self.num_slots) or 0.0)))

    def _check_deadlines(self, ticket: Ticket, *, now: float) -> None:
        """Raises DeadlineTooShort."""
        slots = ticket.num_sequences * ticket.slots_per_sequence
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
                sequence_steps=max(self._longest_steps, ticket.steps_per_sequence),
                widest_sequence=max(self._widest_sequence, ticket.slots_per_sequence),
            )
        if late_s > 0:
            raise DeadlineTooShort(_retry_s(late_s))

    def _loads(self, ticket: Ticket) -> list[KeyLoad]:
        """The waiting work of each key if the new request is admitted."""
        added = ticket.num_sequences * ticket.slots_per_sequence * ticket.steps_per_sequence
        loads = [
            KeyLoad(work=key.work, deadline=key.earliest_deadline())
            for key_id, key in self._keys.items()
            if key_id != ticket.key_id
        ]
        own = self._keys.get(ticket.key_id)
        if own is None:
            return [*loads, KeyLoad(work=added, deadline=ticket.deadline)]
        work = own.work + added
        deadline = min(own.earliest_deadline(), ticket.deadline)
        return [*loads, KeyLoad(work=work, deadline=deadline, reserve=work)]

    def _releases(self) -> list[int]:
        """(num_slots) steps until each slot is free, ascending."""
        steps = [0] * self._num_free
        for left, slots in self._running():
            steps += [left] * slots
        return sorted(steps)

    def _running(self) -> list[tuple[int, int]]:
        """(steps left, slots) of each sequence in flight."""
        return [
            (max(0, end - self._steps), request.ticket.slots_per_sequence)
            for request in self._active.values()
            for end in request.running.values()
        ]

    def _look_ahead(self) -> dict[str, tuple[int, int]]:
        """For each request without a grant: its position, and the step at which it gets its first grant."""
        if self._places is None:
            keys = [
                (tag, arrival, [(own, since, request.as_waiting()) for own, since, request in key.requests.in_turn()])
                for tag, arrival, key in self._keys.in_turn()
            ]
            first = first_grants(keys, self._running(), num_free=self._num_free)
            self._places = {name: (place, self._steps + steps) for name, (place, steps) in first.items()}
        return self._places

    def _enqueue(self, request: _Request) -> None:
        ticket = request.ticket
        self._requests[ticket.request_id] = request
        self._deadlines.put(ticket.request_id, (ticket.deadline,))
        key = self._keys.get(ticket.key_id)
        if key is None:
            key = _Key()
            self._keys.add(ticket.key_id, key)
        key.requests.add(ticket.request_id, request)
        key.deadlines.put(ticket.request_id, (ticket.deadline,))
        self._longest_steps = max(self._longest_steps, ticket.steps_per_sequence)
        self._widest_sequence = max(self._widest_sequence, ticket.slots_per_sequence)
        self._count_waiting(key, ticket, ticket.num_sequences)

    def _allocate(self, key: _Key, request: _Request) -> None:
        """Gives the request's next sequence its slots."""
        ticket = request.ticket
        cost = ticket.slots_per_sequence * ticket.steps_per_sequence
        request.running[request.num_granted] = self._steps + ticket.steps_per_sequence
        self._active[ticket.request_id] = request
        request.num_granted += 1
        self._num_free -= ticket.slots_per_sequence
        self._keys.charge(ticket.key_id, cost)
        key.requests.charge(ticket.request_id, cost)
        self._count_waiting(key, ticket, -1)
        if not request.num_waiting:
            self._dequeue(key, ticket)

    def _withdraw(self, request: _Request) -> None:
        """Removes a request's waiting sequences from the queue."""
        key = self._keys.get(request.ticket.key_id)
        if key is not None and request.ticket.request_id in key.requests:
            self._count_waiting(key, request.ticket, -request.num_waiting)
            self._dequeue(key, request.ticket)

    def _dequeue(self, key: _Key, ticket: Ticket) -> None:
        key.requests.discard(ticket.request_id)
        key.deadlines.discard(ticket.request_id)
        if not key.requests:
            self._keys.discard(ticket.key_id)
        if not self._keys:
            self._longest_steps = self._widest_sequence = 1

    def _count_waiting(self, key: _Key, ticket: Ticket, num_sequences: int) -> None:
        key.num_sequences += num_sequences
        key.work += num_sequences * ticket.slots_per_sequence * ticket.steps_per_sequence
        self._num_waiting_sequences += num_sequences
        self._num_waiting_slots += num_sequences * ticket.slots_per_sequence
        self._places = None

    def _forget(self, request: _Request) -> None:
        del self._requests[request.ticket.request_id]
        self._active.pop(request.ticket.request_id, None)
        self._deadlines.discard(request.ticket.request_id)
        self._places = None


def _retry_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
