"""Previews show generated rows and the init image, and nothing else."""

import pytest
import torch

from serve.worker.previews import blank_missing, fill_rows, preview_rows


@pytest.mark.parametrize("grid_size", [2, 6, 16])
@pytest.mark.parametrize("count", range(20))
def test_previews_are_evenly_spread_and_never_of_a_complete_image(count: int, grid_size: int) -> None:
    rows = preview_rows(count, grid_size)
    assert len(rows) == min(count, grid_size - 1)
    assert rows == sorted(set(rows))
    assert all(0 < row < grid_size for row in rows)
    gaps = [after - before for before, after in zip([0, *rows], [*rows, grid_size], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_missing_rows_repeat_the_last_generated_one() -> None:
    sampled = torch.tensor([1, 2, 3, 4, 5, 6, 7])  # two rows of three, and a token more
    filled = fill_rows(sampled, rows_generated=2, grid_size=3, init_tokens=None)
    assert filled.tolist() == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_the_init_image_fills_what_it_keeps() -> None:
    init_tokens = torch.tensor([-1, -1, -1, -1, -1, -1, -1, 30, 31])
    filled = fill_rows(torch.tensor([1, 2, 3]), rows_generated=1, grid_size=3, init_tokens=init_tokens)
    assert filled.tolist() == [1, 2, 3, 1, 2, 3, 1, 30, 31]


def test_only_cells_that_are_neither_generated_nor_kept_are_plain() -> None:
    images = torch.zeros(2, 3, 4, 4)
    shown = blank_missing(images, rows_generated=1, grid_size=2, init_tokens=torch.tensor([-1, -1, -1, 5]))
    assert (shown[:, :, :2] == 0).all()
    assert (shown[:, :, 2:, 2:] == 0).all()
    assert (shown[:, :, 2:, :2] > 0.5).all()
    assert (images == 0).all()
