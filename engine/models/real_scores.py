"""Scores of real pairs: what a ranker's score of a generated image is worth.

A cosine of 0.62 says nothing to anyone, and every ranker has its own scale. Its place among the scores that held-out photographs
get with their own captions does: `closer than 83 % of real pairs`. A model folder keeps these as percentiles, in real_scores.json,
written by `kodalle calibrate` and at the end of `kodalle train PHOTOS`. Where candidates are ranked by contrast
(engine.pipeline.ranking), certainty has its place among theirs: an order and its places never disagree.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from engine.config.section import Section, parse_section
from engine.files import read_json, write_json

REAL_SCORES_FILE = "real_scores.json"
_STEPS = 100


class RealScores(Section):
    """Percentiles of the scores of held-out pairs."""

    pairs: int = Field(gt=0, description="held-out pairs that were scored")
    ranker: str = Field(description="digest of the ranker whose scores they are (engine.models.folder.weights_digest)")
    percentiles: tuple[float, ...] = Field(description="the least score, that of each per cent, the greatest: 101")
    certainty_percentiles: tuple[float, ...] | None = Field(
        default=None,
        description="the same of their certainty, 0 (a guess) to 1; null where candidates are ranked by score",
    )

    @model_validator(mode="after")
    def _is_a_distribution(self) -> "RealScores":
        for name in ("percentiles", "certainty_percentiles"):
            table = getattr(self, name)
            if table is not None and (len(table) != _STEPS + 1 or list(table) != sorted(table)):
                raise ValueError(f"{name} must be {_STEPS + 1} numbers, none less than the one before")
        return self

    def percentile(self, score: float, certainty: float | None = None) -> float:
        """Per cent of real pairs below, 0 to 100, by certainty where there is one; between two percentiles in proportion."""
        if certainty is not None and self.certainty_percentiles is not None:
            return _place(self.certainty_percentiles, certainty)
        return _place(self.percentiles, score)


def real_scores(scores: Sequence[float], *, ranker: str, certainties: Sequence[float] = ()) -> RealScores:
    """The tables of these scores and, where there are any, certainties; `ranker` is the digest of what gave them."""
    return RealScores(
        pairs=len(scores),
        ranker=ranker,
        percentiles=_percentiles(scores),
        certainty_percentiles=_percentiles(certainties) if certainties else None,
    )


def _percentiles(values: Sequence[float]) -> tuple[float, ...]:
    found = np.percentile(np.asarray(values, dtype=np.float64), np.arange(_STEPS + 1))
    return tuple(round(float(value), 5) for value in found)


def _place(table: tuple[float, ...], value: float) -> float:
    place = bisect_left(table, value)
    if place in (0, len(table)):
        return float(min(place, _STEPS))
    below, above = table[place - 1 : place + 1]
    return place - 1 + (value - below) / (above - below)


def read_real_scores(folder: Path) -> RealScores | None:
    """The table of a model folder, whichever ranker it is of; None where there is none.

    Raises:
        InputError: its file is not of that form.
    """
    path = folder / REAL_SCORES_FILE
    if not path.is_file():
        return None
    tree = read_json(path, field="model folder", remedy="make it again with `kodalle calibrate`, or remove it")
    if isinstance(tree, dict):
        tree.pop("gain_percentiles", None)  # before the contrast had questions: of another scale
    found: RealScores = parse_section(RealScores, tree, source=str(path))
    return found


def write_real_scores(folder: Path, scores: RealScores) -> None:
    """Writes real_scores.json."""
    write_json(folder / REAL_SCORES_FILE, scores.model_dump(mode="json"))
