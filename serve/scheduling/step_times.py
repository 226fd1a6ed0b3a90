"""Seconds per decoder step by occupancy: the estimate that all predicted times are based on.

A step with all slots taken may take many times as long as a step of one sequence (on a CPU it does, on a GPU hardly), so a
single average would be far too optimistic when the load rises from nothing. Each eighth of the slots has its own moving
average; an eighth without measurements uses the nearest fuller one that has some, else the nearest emptier one.
"""

_CLASSES = 8
# Of a new step: damps the noise of single steps to an eighth; a lasting change is followed within a second or two.
_WEIGHT = 1 / 32


class StepTimes:
    """Moving averages of the seconds per step.

    Args:
        num_slots: all slots of the decoder.
    """

    def __init__(self, *, num_slots: int) -> None:
        self._num_slots = num_slots
        self._means_s: list[float | None] = [None] * _CLASSES

    def observe(self, *, seconds: float, slots: int) -> None:
        """Adds a step with `slots` slots taken."""
        place = self._place(slots)
        mean_s = self._means_s[place]
        self._means_s[place] = seconds if mean_s is None else mean_s + _WEIGHT * (seconds - mean_s)

    def seconds(self, slots: int) -> float | None:
        """Estimate for a step with `slots` slots taken; None before the first measurement."""
        place = self._place(slots)
        fuller, emptier = self._means_s[place:], self._means_s[:place][::-1]
        return next((mean_s for mean_s in fuller + emptier if mean_s is not None), None)

    def _place(self, slots: int) -> int:
        return max(0, min(_CLASSES, -(-slots * _CLASSES // self._num_slots)) - 1)
