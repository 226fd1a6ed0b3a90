"""Any order of calls to the scheduler, against a model that only counts."""

import math
import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serve.scheduling.scheduler import Scheduler
from serve.scheduling.tickets import QueueFull, Ticket
from tests.serve.scheduling.test_scheduler import FAR, STEPS, drain


@dataclass
class Modelled:
    ticket: Ticket
    granted: int = 0
    running: set[int] = field(default_factory=set)


class SchedulerModel(RuleBasedStateMachine):
    """Any order of calls against a model that only counts."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.subject = Scheduler(num_slots=5, max_queued_sequences=12)
        self.model: dict[str, Modelled] = {}
        self.num_submitted = 0

    @rule(target=ids, key=st.sampled_from("xyz"), num_sequences=st.integers(1, 7), width=st.integers(1, 2))
    def submit(self, key: str, num_sequences: int, width: int) -> str:
        self.num_submitted += 1
        new = Ticket(f"r{self.num_submitted}", key, num_sequences, width, STEPS, FAR)
        fits_at_once = self.subject.queued_sequences == 0 and num_sequences * width <= 5 - self.subject.slots_in_use
        try:
            self.subject.submit(new, now=0)
        except QueueFull:
            assert not fits_at_once
        else:
            self.model[new.request_id] = Modelled(new)
        return new.request_id

    @rule()
    def grant(self) -> None:
        for grant in self.subject.grant(now=0):
            request = self.model[grant.request_id]  # a cancelled one is not here
            assert grant.candidate == request.granted  # each once, in order
            request.granted += 1
            request.running.add(grant.candidate)

    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick: random.Random) -> None:
        running = [(name, one) for name, request in self.model.items() for one in sorted(request.running)]
        if not running:
            return
        name, candidate = pick.choice(running)
        request = self.model[name]
        request.running.remove(candidate)
        is_last = not request.running and request.granted == request.ticket.num_sequences
        assert self.subject.sequence_finished(name, candidate) == is_last
        if is_last:
            del self.model[name]

    @rule(name=consumes(ids))
    def cancel(self, name: str) -> None:
        request = self.model.pop(name, None)
        assert sorted(self.subject.cancel(name)) == (sorted(request.running) if request else [])

    @rule(seconds=st.floats(0.001, 1))
    def step(self, seconds: float) -> None:
        self.subject.observe_step(seconds=seconds, slots=self.subject.slots_in_use)

    @invariant()
    def counts_agree(self) -> None:
        requests = self.model.values()
        in_use = sum(len(request.running) * request.ticket.slots_per_sequence for request in requests)
        assert self.subject.slots_in_use == in_use <= 5
        assert self.subject.queued_sequences == sum(
            request.ticket.num_sequences - request.granted for request in requests
        )
        assert self.subject.num_active == sum(request.granted > 0 for request in requests)
        assert self.subject.num_waiting == sum(request.granted == 0 for request in requests)
        assert self.subject.queued_sequences <= 5 + 12 * (
            1 + 1 / 2 + 1 / 3
        )  # sequences for free slots, and three keys' shares

    @invariant()
    def positions_are_numbered_without_gaps(self) -> None:
        waiting = [name for name, request in self.model.items() if request.granted == 0]
        places = {name: self.subject.position(name) for name in self.model}
        assert {places[name] for name in waiting} == set(range(1, len(waiting) + 1))
        assert all(places[name] is None for name in self.model if name not in waiting)

    def teardown(self) -> None:
        """No request starves: as sequences keep finishing, every request ends, and all counts return to 0."""
        left = [(name, one) for name, r in self.model.items() for one in range(r.granted, r.ticket.num_sequences)]
        for name, request in self.model.items():
            for candidate in request.running:
                self.subject.sequence_finished(name, candidate)
        assert sorted(drain(self.subject)) == sorted(left)
        assert (self.subject.slots_in_use, self.subject.queued_sequences) == (0, 0)
        assert (self.subject.num_waiting, self.subject.num_active) == (0, 0)
        assert self.subject.overdue(now=math.inf) == []


TestSchedulerModel = SchedulerModel.TestCase
TestSchedulerModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
