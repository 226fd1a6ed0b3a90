"""Recall@k against a plain count, and what must not pass for a good score."""

import pytest
import torch

from engine.metrics.retrieval import num_distinct, recall_at

CAPTIONS = torch.arange(6)[:, None] * torch.ones(1, 3, dtype=torch.long)  # (6, 3), all different


def test_perfect_and_hopeless_scores() -> None:
    assert recall_at(torch.eye(6), CAPTIONS, among=100, ranks=(1, 5)) == {1: 1.0, 5: 1.0}
    assert recall_at(-torch.eye(6), CAPTIONS, among=100, ranks=(1, 5, 6)) == {1: 0.0, 5: 0.0, 6: 1.0}


def test_counts_as_sorting_would() -> None:
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    captions = torch.arange(40)[:, None]
    place = [scores[row].argsort(descending=True).tolist().index(row) for row in range(40)]
    found = recall_at(scores, captions, among=100, ranks=(1, 5, 20))
    assert found == {rank: pytest.approx(sum(p < rank for p in place) / 40) for rank in (1, 5, 20)}


def test_a_model_that_finds_all_alike_scores_nothing() -> None:
    assert recall_at(torch.ones(6, 6), CAPTIONS, among=100, ranks=(1, 5)) == {1: 0.0, 5: 0.0}
    assert recall_at(torch.full((6, 6), torch.nan), CAPTIONS, among=100, ranks=(1, 5)) == {1: 0.0, 5: 0.0}


def test_equal_captions_count_once() -> None:
    captions = torch.tensor([[1], [1], [2], [2]])
    scores = torch.tensor([[1.0, 9, 0, 9], [9, 9, 9, 9], [0, 9, 1, 9], [9, 9, 9, 9]])
    assert num_distinct(captions) == 2
    assert recall_at(scores, captions, among=100, ranks=(1,)) == {1: 1.0}


def test_among_limits_the_competition() -> None:
    scores = torch.eye(6)
    scores[0, 5] = 2  # a better caption for the first image, but the sixth
    assert recall_at(scores, CAPTIONS, among=6, ranks=(1,))[1] == pytest.approx(5 / 6)
    assert recall_at(scores, CAPTIONS, among=5, ranks=(1,))[1] == 1.0
