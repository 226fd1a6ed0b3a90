"""A heap whose members are known by name: the first in order, and any one taken out again.

`heapq` alone cannot take out what stands in the middle. Here that only forgets the name; the entry left behind is
dropped when it comes to the top, or with all others of its kind once they are the larger half. So `put`, `discard` and
`first` cost O(log n) on average, and memory follows the number of members: a cancelled request leaves nothing behind.
"""

import heapq

Order = tuple[float, ...]
_STALE_ALLOWED = 16  # a heap this small is not worth cleaning


class KeyedHeap:
    """Names, each with a tuple by which they are ordered."""

    def __init__(self) -> None:
        self._orders: dict[str, Order] = {}
        self._entries: list[tuple[Order, str]] = []

    def __len__(self) -> int:
        return len(self._orders)

    def __contains__(self, name: str) -> bool:
        return name in self._orders

    def order(self, name: str) -> Order:
        """Raises KeyError for an unknown name."""
        return self._orders[name]

    def put(self, name: str, order: Order) -> None:
        """Adds a name, or moves it."""
        self._orders[name] = order
        heapq.heappush(self._entries, (order, name))
        self._clean()

    def discard(self, name: str) -> None:
        """Takes a name out; an unknown one is left as it is: not there."""
        if self._orders.pop(name, None) is not None:
            self._clean()

    def first(self) -> str | None:
        """The name that is first in order; None when there is none."""
        entries = self._entries
        while entries and not self._is_member(entries[0]):
            heapq.heappop(entries)
        return entries[0][1] if entries else None

    def before(self, order: Order) -> list[str]:
        """The names whose order is less than `order`, in no order; walks only entries that are."""
        found, places = [], [0]
        while places:
            place = places.pop()
            if place < len(self._entries) and self._entries[place][0] < order:
                if self._is_member(self._entries[place]):
                    found.append(self._entries[place][1])
                places += [2 * place + 1, 2 * place + 2]
        return list(dict.fromkeys(found))  # a name put twice in the same place has two entries

    def _is_member(self, entry: tuple[Order, str]) -> bool:
        return self._orders.get(entry[1]) == entry[0]

    def _clean(self) -> None:
        if len(self._entries) > 2 * len(self._orders) + _STALE_ALLOWED:
            self._entries = [(order, name) for name, order in self._orders.items()]
            heapq.heapify(self._entries)
