"""A priority queue of names that supports removal of any name.

`heapq` alone cannot remove an entry from the middle. Here a removal only forgets the name; its stale entry is dropped when
it reaches the top, or with all other stale entries once they are the majority. So `put`, `discard` and `first` cost
O(log n) on average, and memory is proportional to the number of names: a cancelled request leaves nothing behind.
"""

import heapq

Order = tuple[float, ...]
_STALE_ALLOWED = 16  # a heap this small is not worth cleaning


class KeyedHeap:
    """Names ordered by a tuple each."""

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
        """Adds a name, or changes its order."""
        self._orders[name] = order
        heapq.heappush(self._entries, (order, name))
        self._clean()

    def discard(self, name: str) -> None:
        """Removes a name, if present."""
        if self._orders.pop(name, None) is not None:
            self._clean()

    def first(self) -> str | None:
        """The first name in order; None when empty."""
        entries = self._entries
        while entries and not self._is_member(entries[0]):
            heapq.heappop(entries)
        return entries[0][1] if entries else None

    def before(self, order: Order) -> list[str]:
        """The names whose order is less than `order`, unordered; visits only such entries."""
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
