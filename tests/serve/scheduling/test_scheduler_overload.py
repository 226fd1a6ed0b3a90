import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from serve.scheduling.scheduler import MIN_RETRY_S, Scheduler
from serve.scheduling.tickets import DeadlineTooShort, Ticket

FAR = 1e9


@dataclass
class Outcome:
    admitted: int = 0
    retries_s: list[float] = field(default_factory=list)  # of the refused
    late: int = 0
    busy: float = 0.0  # share of slot-seconds in use
    sequences: Counter[str] = field(default_factory=Counter)  # finished, by key


def play_overload(seed: int, *, by_deadline: bool, load: float = 10.0, until_s: float = 600.0) -> Outcome:
    """Poisson arrivals at `load` times the capacity of 32 slots, four fifths of them one key's; step times are noisy.

    A step takes 4 ms and 1 ms a slot, times a log-normal factor (sigma 0.3), times a drift of 15 % up and down in two
    minutes. `by_deadline=False` hides the deadlines from the scheduler.
    """
    num_slots, steps, deadline_s, rng, outcome = 32, 64, 30.0, random.Random(seed), Outcome()
    subject = Scheduler(num_slots=num_slots, max_queued_sequences=100_000)
    full_step_s, sizes = 0.004 + 0.001 * num_slots, (1, 4, 16, 48)
    rate = load * num_slots / (steps * full_step_s) / (1.2 * sum(sizes) / len(sizes))  # a fifth is guided
    now, next_s, index, slot_s, used_s = 0.0, rng.expovariate(rate), 0, 0.0, 0.0
    due: dict[str, tuple[float, str]] = {}
    ending: dict[int, list[tuple[str, int]]] = {}  # step -> sequences that end with it
    for step in range(10**9):
        while next_s <= min(now, until_s):
            key, width = rng.choices("abc", (8, 1, 1))[0], 1 + (rng.random() < 0.2)
            seen = next_s + deadline_s if by_deadline else FAR
            new, index = Ticket(f"r{index}", key, rng.choice(sizes), width, steps, seen), index + 1
            try:
                subject.submit(new, now=now)
                due[new.request_id] = (next_s + deadline_s, key)
                outcome.admitted += 1
            except DeadlineTooShort as error:
                outcome.retries_s.append(error.retry_after_s)
            next_s += rng.expovariate(rate)
        for grant in subject.grant(now=now):
            ending.setdefault(step + steps - 1, []).append((grant.request_id, grant.candidate))
        if not subject.slots_in_use:
            if next_s > until_s:
                break
            now = next_s
            continue
        noise = rng.lognormvariate(-(0.3**2) / 2, 0.3) * (1 + 0.15 * math.sin(now * 2 * math.pi / 120))
        seconds = (0.004 + 0.001 * subject.slots_in_use) * noise
        now, slot_s, used_s = now + seconds, slot_s + seconds * num_slots, used_s + seconds * subject.slots_in_use
        subject.observe_step(seconds=seconds, slots=subject.slots_in_use)
        for name, candidate in ending.pop(step, []):
            if name in due:
                outcome.sequences[due[name][1]] += now <= until_s
                if subject.sequence_finished(name, candidate):
                    outcome.late += now > due.pop(name)[0]
        for name in [name for name, (deadline, _) in due.items() if deadline < now] if step % 64 == 0 else []:
            subject.cancel(name)
            del due[name]
            outcome.late += 1
    outcome.busy = used_s / slot_s
    assert (subject.slots_in_use, subject.queued_sequences, subject.num_waiting, due) == (0, 0, 0, {})
    return outcome


@pytest.mark.parametrize("seed", range(6))
def test_at_ten_times_the_load_no_admitted_request_is_late_and_no_slot_is_idle(seed: int) -> None:
    outcome = play_overload(seed, by_deadline=True)
    assert outcome.late == 0
    assert outcome.admitted > 500
    assert len(outcome.retries_s) > outcome.admitted  # the load was an overload
    assert outcome.busy > 0.97
    assert (
        MIN_RETRY_S <= min(outcome.retries_s) <= max(outcome.retries_s) <= 60
    )  # no queue is longer than two deadlines
    assert (
        min(outcome.sequences["b"], outcome.sequences["c"]) > 0.15 * outcome.sequences.total()
    )  # with a tenth of the requests each


def test_without_admission_by_deadline_requests_are_late() -> None:
    outcome = play_overload(0, by_deadline=False, until_s=60.0)
    assert outcome.late > outcome.admitted / 2


def test_well_below_capacity_no_request_is_refused_or_late() -> None:
    outcome = play_overload(0, by_deadline=True, load=0.3, until_s=1200.0)
    assert (outcome.retries_s, outcome.late) == ([], 0)
    assert outcome.admitted > 100
