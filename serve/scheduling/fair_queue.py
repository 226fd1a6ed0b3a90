"""Start-time fair queueing of flows that share a server.

Each flow has a tag: how much it has been served, in units of cost. The flow with the lowest tag is next, the older one of
equals; being served raises its tag by the cost. So of two waiting flows, neither gets ahead of the other by more than the
cost of one turn of each, whatever their numbers and sizes (Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996,
theorem 1).

A new flow's tag is the virtual clock. In the paper the clock is the tag at which the latest turn started; here it is the
tag at which it ended, as in self-clocked fair queueing (Golestani, INFOCOM 1994). With the start tag, an endless stream of
new flows would each be served before an old flow's second turn and starve it: flows here are requests, which keep coming,
whereas the paper's are long-lived connections. With the end tag, every turn moves the clock past some flow, and flows that
are added later queue behind it. It also follows that a flow gains nothing by being removed and added again, and that no
state is kept of removed flows.
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

    def add(self, name: str, flow: Flow) -> None:
        """Adds a flow; raises ValueError for a name that is in the queue already."""
        if name in self._flows:
            raise ValueError(f"{name} is in the queue already")
        self._flows[name] = flow
        self._heap.put(name, (self._clock, next(self._arrivals)))

    def discard(self, name: str) -> None:
        """Removes a flow, if present."""
        self._flows.pop(name, None)
        self._heap.discard(name)

    def first(self) -> Flow | None:
        """The flow that is next; None when the queue is empty."""
        name = self._heap.first()
        return None if name is None else self._flows[name]

    def charge(self, name: str, cost: float) -> None:
        """Charges a flow for a turn."""
        tag, arrival = self._heap.order(name)
        self._heap.put(name, (tag + cost, arrival))
        self._clock = max(self._clock, tag + cost)

    def items(self) -> Iterable[tuple[str, Flow]]:
        """(name, flow) of all flows, unordered."""
        return self._flows.items()

    def in_turn(self) -> list[tuple[float, float, Flow]]:
        """(tag, arrival, flow) of all flows, next first: O(n log n)."""
        turns = sorted((self._heap.order(name), name) for name in self._flows)
        return [(order[0], order[1], self._flows[name]) for order, name in turns]
