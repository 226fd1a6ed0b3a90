"""What passes between the scheduler and its caller: tickets, grants, refusals."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ticket:
    """A request as the scheduler sees it."""

    request_id: str
    key_id: str
    num_sequences: int
    slots_per_sequence: int  # 2 when guided
    steps_per_sequence: int
    deadline: float  # on the caller's clock: when its last sequence must be finished


@dataclass(frozen=True)
class Grant:
    """Slots for one sequence, from now on. A request's sequences are granted in order."""

    request_id: str
    candidate: int  # from 0


class Overloaded(Exception):
    """A request is not admitted now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """The queue has no room for the request's sequences."""


class DeadlineTooShort(Overloaded):
    """With this request admitted, it or an earlier one would miss its deadline."""
