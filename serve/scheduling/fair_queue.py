"""Who is next among flows that share a server: start-time fair queueing.

Each flow has a tag: how much it has been served, in units of cost. The flow with the lowest tag is next, the elder of
two equals; being served raises its tag by the cost. So of two flows that both wait, neither gets ahead of the other by
more than what one turn of each costs, whatever their numbers and sizes (Goyal, Vin, Cheng, "Start-time Fair Queueing",
SIGCOMM 1996, theorem 1).

A newcomer's tag is the clock. In the paper the clock is the tag at which the latest turn started; here it is the tag at
which it ended, as in self-clocked fair queueing (Golestani, INFOCOM 1994). By the start, each of an endless stream of
newcomers stands before an old flow's second turn, and the old flow starves: flows here are requests, which come without
end, while the paper's are connections that stay. By the end, every turn moves the clock past somebody, and those that
join later stand behind. It also follows that a flow gains nothing by leaving and returning, and that nothing has to be
remembered of one that left.
"""

import itertools
from collections.abc import Iterable
from typing import Generic, TypeVar

from serve.scheduling.keyed_heap import KeyedHeap

Flow = TypeVar("Flow")


class FairQueue(Generic[Flow]):
    """Flows by name, all of equal weight. Each call costs O(log n) on average, except `in_turn`."""

    def __init__(self) -> None:
        self._flows: dict[str, Flow] = {}
        self._heap = KeyedHeap()  # (tag, arrival)
        self._clock: float = 0
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, name: str) -> bool:
        return name in self._flows

    def get(self, name: str) -> Flow | None:
        return self._flows.get(name)

    def join(self, name: str, flow: Flow) -> None:
        """Raises ValueError for a name that is here already."""
        if name in self._flows:
            raise ValueError(f"{name} waits already")
        self._flows[name] = flow
        self._heap.put(name, (self._clock, next(self._arrivals)))

    def leave(self, name: str) -> None:
        """Takes a flow out, if it is here."""
        self._flows.pop(name, None)
        self._heap.discard(name)

    def first(self) -> Flow | None:
        """The flow whose turn it is; None when nobody waits."""
        name = self._heap.first()
        return None if name is None else self._flows[name]

    def charge(self, name: str, cost: float) -> None:
        """Counts a turn of a flow."""
        tag, arrival = self._heap.order(name)
        self._heap.put(name, (tag + cost, arrival))
        self._clock = max(self._clock, tag + cost)

    def items(self) -> Iterable[tuple[str, Flow]]:
        """(name, flow) of all, in no order."""
        return self._flows.items()

    def in_turn(self) -> list[tuple[float, float, Flow]]:
        """(tag, arrival, flow) of all flows, next first: O(n log n)."""
        turns = sorted((self._heap.order(name), name) for name in self._flows)
        return [(order[0], order[1], self._flows[name]) for order, name in turns]
