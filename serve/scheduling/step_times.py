"""How long a step of the decoder takes, by how full it is: what every promise about time rests on.

A step over a full house may take many times a step of one row (on a CPU it does, on a GPU hardly), so one average would
promise far too much when load comes up from nothing. Each eighth of the slots has its own moving average; the time for
a number of rows that was not seen yet is that of the nearest fuller eighth that was, else of the nearest emptier one.
"""

_CLASSES = 8
_WEIGHT = (
    1 / 32
)  # of a new step: noise of single steps is damped to an eighth, a lasting change is known in a second or two


class StepTimes:
    """Moving averages of seconds a step.

    Args:
        num_slots: a full house.
    """

    def __init__(self, *, num_slots: int) -> None:
        self._num_slots = num_slots
        self._means_s: list[float | None] = [None] * _CLASSES

    def observe(self, *, seconds: float, rows: int) -> None:
        """Counts a step of `rows` slots in."""
        place = self._place(rows)
        mean_s = self._means_s[place]
        self._means_s[place] = seconds if mean_s is None else mean_s + _WEIGHT * (seconds - mean_s)

    def seconds(self, rows: int) -> float | None:
        """Of a step with `rows` slots taken; None before the first measurement."""
        place = self._place(rows)
        fuller, emptier = self._means_s[place:], self._means_s[:place][::-1]
        return next((mean_s for mean_s in fuller + emptier if mean_s is not None), None)

    def _place(self, rows: int) -> int:
        return max(0, min(_CLASSES, -(-rows * _CLASSES // self._num_slots)) - 1)
