"""What the best of N candidates is worth, against every way of taking N of them."""

import itertools

import pytest

from engine.metrics.best_of_n import BestOfCurves, best_of_numbers, expected_best


def test_the_expectation_is_the_mean_over_all_subsets() -> None:
    ranked = [0.2, 1.0, 0.0, 0.5, 0.7, 0.1]  # values; the place is the rank
    for number in range(1, 7):
        firsts = [ranked[min(places)] for places in itertools.combinations(range(6), number)]
        assert expected_best(ranked, number) == pytest.approx(sum(firsts) / len(firsts))
    assert expected_best(ranked, 1) == pytest.approx(sum(ranked) / 6)
    assert expected_best(ranked, 6) == 0.2
    assert {expected_best([1.0] * 96, number) for number in range(1, 97)} == {1.0}
    assert sum(range(97)) / 97 == pytest.approx(expected_best(list(map(float, range(97))), 1))  # no overflow


def test_numbers_are_powers_of_two_and_the_whole() -> None:
    assert best_of_numbers(96) == [1, 2, 4, 8, 16, 32, 64, 96]
    assert best_of_numbers(8) == [1, 2, 4, 8]
    assert best_of_numbers(1) == [1]


def test_curves_follow_the_order_and_the_bound_follows_the_measure() -> None:
    curves = BestOfCurves(4)
    curves.add({"right": [1, 0, 1, 0], "other": [1.0, None, 0, 0]}, {"right": 1.0, "other": None})
    curves.add({"right": [0, 0, 0, 1]}, {"right": 0.0})
    found = curves.report()
    assert (found["candidates"], found["numbers"]) == (4, [1, 2, 4])
    assert set(found["measures"]) == {"right"}  # the other is not known of all candidates
    right = found["measures"]["right"]
    # of two: the first with 3/6, the second 2/6, the third 1/6
    assert right["top_ranked"] == pytest.approx([(2 / 4 + 1 / 4) / 2, (3 / 6 + 1 / 6 + 0) / 2, (1 + 0) / 2])
    assert right["best"] == pytest.approx([(2 / 4 + 1 / 4) / 2, (1 - 1 / 6 + 3 / 6) / 2, 1])
    assert right["standard_error"][2] == pytest.approx(0.5)  # 1 and 0
    assert (right["captions"], right["real"]) == (2, 0.5)


def test_a_ranker_that_ranks_by_the_measure_reaches_the_bound_and_a_blind_one_stays_at_random() -> None:
    values = [0.3, 0.9, 0.1, 0.6, 0.5]
    perfect, blind = BestOfCurves(5), BestOfCurves(5)
    perfect.add({"m": sorted(values, reverse=True)}, {})
    for order in itertools.permutations(values):
        blind.add({"m": order}, {})
    found = perfect.report()["measures"]["m"]
    assert found["top_ranked"] == found["best"]
    assert found["real"] is None
    assert blind.report()["measures"]["m"]["top_ranked"] == pytest.approx([sum(values) / 5] * 4)
