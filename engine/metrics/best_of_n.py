"""Best-of-N: what ranking N candidates and keeping the best is worth, for N = 1 ... the number generated.

With n candidates of a caption, the expectation over all ways of taking N of them is exact, no sampling is needed: of candidates in
the ranker's order, the one at place r (from 0) is the best of a random N with probability

    w_r = C(n - 1 - r, N - 1) / C(n, N)

N = 1 is a candidate taken at random. What the ranker's own score gains shows only that it ranks; what the colour, the classifier, the oracle
or a CLIP that had no part in it gain is what a user gets. `best` is a perfect ranker for each measure, the bound of every ranker.

Source of the estimate: Chen et al. 2021, arXiv:2107.03374 (pass@k); of the practice: DALL-E, arXiv:2102.12092, figure 6.

G captions, n candidates of each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = Sequence[float | None]


@dataclass
class BestOfCurves:
    """Values of the candidates of several captions, each by measure, and of the captions' own photographs."""

    num_candidates: int
    _values: dict[str, list[list[float]]] = field(default_factory=dict)  # best-ranked candidate first
    _real: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measures: Mapping[str, Values], real: Mapping[str, float | None]) -> None:
        """Adds a caption.

        Args:
            measures: of each of n candidates, in the ranker's order, best first; a measure with None among them is left out for this
                caption.
            real: of the photograph that the caption belongs to.
        """
        for name, values in measures.items():
            known = [value for value in values if value is not None]
            assert len(values) == self.num_candidates, f"{len(values)} of {name}, expected {self.num_candidates}"
            if len(known) == len(values):
                self._values.setdefault(name, []).append(known)
                if (photograph := real.get(name)) is not None:
                    self._real.setdefault(name, []).append(photograph)

    def report(self) -> dict[str, Any]:
        """The curves.

        Returns:
            candidates; numbers: N; measures: by name: captions (those that the measure says something of); for each N
            top_ranked and standard_error, the expectation for the ranker's choice and its error over captions, and best, for a
            perfect ranker; real: of the captions' own photographs.
        """
        numbers = best_of_numbers(self.num_candidates)
        measures = {}
        for name, captions in self._values.items():
            top = [[expected_best(values, number) for values in captions] for number in numbers]
            best = [[expected_best(sorted(values, reverse=True), number) for values in captions] for number in numbers]
            real = self._real.get(name)
            measures[name] = {
                "captions": len(captions),
                "top_ranked": [_mean(values) for values in top],
                "standard_error": [_standard_error(values) for values in top],
                "best": [_mean(values) for values in best],
                "real": _mean(real) if real else None,
            }
        return {"candidates": self.num_candidates, "numbers": numbers, "measures": measures}


def best_of_numbers(candidates: int) -> list[int]:
    """1, 2, 4, ..., and the number itself."""
    return [1 << power for power in range((candidates - 1).bit_length())] + [candidates]


def expected_best(ranked: Sequence[float], number: int) -> float:
    """The expected value of the best-ranked of `number` candidates taken at random without replacement.

    Args:
        ranked: values of n candidates, the best-ranked first.
        number: 1 to n.
    """
    n = len(ranked)
    ways = math.comb(n, number)
    # Rounded, so that n equal values have that value as their expectation, and no curve of them has steps of 1e-16.
    return round(
        math.fsum(math.comb(n - 1 - place, number - 1) / ways * value for place, value in enumerate(ranked)), 12
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
