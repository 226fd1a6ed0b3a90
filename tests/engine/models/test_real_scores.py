"""Scores of real pairs as a table of percentiles, and a score's place in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from engine.models.real_scores import REAL_SCORES_FILE, RealScores, read_real_scores, real_scores, write_real_scores


def test_a_place_is_the_share_of_lower_scores() -> None:
    scores = np.random.default_rng(3).normal(0.5, 0.1, 5000)
    table = real_scores(scores.tolist(), ranker="0" * 16)
    for score in (0.2, 0.43, 0.5, 0.617, 0.9):
        assert table.percentile(score) == pytest.approx(100 * float(np.mean(scores < score)), abs=0.6)
    assert table.pairs == 5000


def test_places_never_fall_and_end_at_0_and_100() -> None:
    table = real_scores([0.1, 0.4, 0.4, 0.9], ranker="0" * 16)
    places = [table.percentile(score) for score in np.linspace(-1, 1, 201)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 100)
    assert table.percentile(0.1) == 0


def test_one_pair_or_equal_scores_are_a_step() -> None:
    table = real_scores([0.5], ranker="0" * 16)
    assert [table.percentile(score) for score in (0.4, 0.5, 0.6)] == [0, 0, 100]


def test_the_table_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_real_scores(tmp_path) is None
    table = real_scores([0.1, 0.2, 0.7], ranker="a" * 16)
    write_real_scores(tmp_path, table)
    assert read_real_scores(tmp_path) == table


@pytest.mark.parametrize("percentiles", [[0.1], [0.5] * 100 + [0.4], ["x"] * 101])
def test_a_file_of_another_form_is_refused(tmp_path: Path, percentiles: list[object]) -> None:
    tree = {"pairs": 3, "ranker": "a", "percentiles": percentiles}
    (tmp_path / REAL_SCORES_FILE).write_text(json.dumps(tree))
    with pytest.raises(InputError, match="percentiles"):
        read_real_scores(tmp_path)


def test_no_pairs_make_no_table() -> None:
    with pytest.raises(ValueError, match="pairs"):
        RealScores(pairs=0, ranker="a", percentiles=(0.0,) * 101)
