"""Image tokens of a grid larger than the trained one: a window of the trained size slides over it.

A transformer knows no cell beyond its g x g grid, but it can generate any g x g part of a larger one, given what of it is there.
Windows overlap by half, so that every new cell has half a window of cells above and to the left of it, but at the borders:

    columns   0        g/2        g       3g/2            windows of a grid of g rows and 2 g columns
              [   window 0 0      ]                       generates all of its cells
                         [   window 0 1      ]            is given its left half, generates the right one
                                   [   window 0 2      ]  likewise

taming-transformers (Esser et al. 2021, arXiv:2012.09841) moves the window with every token, so that the token lies in its middle, and
computes the whole window for each. Windows at whole halves give each new cell the same context or more, and can keep what they
compute. What is computed once, and what cannot be:

* The caption's prefix, once for all windows and candidates.
* Keys and values of a window's own cells, once a window: a window is one generation over the KV cache, in which the cells that are
  known are init tokens. Rows that are known from the window before are read several cells at a time.
* Not the keys and values of the window before. A cell lies elsewhere in the next window: its position, which the embedding adds, is
  another, and so is everything computed from it. In models of relative positions too, every layer but the first has read other cells.

Windows that do not wait for each other, those of a diagonal, are one batch, with all candidates:

    0 1 2 3       window r c needs those above, to the left, and diagonally above-left; so those of
    1 2 3 4       one number are independent of each other

A window is generated with a seed of its own, since equal noise in overlapping windows would repeat patterns; the first one's is the
request's, so that an image of the trained size is a plain generation, and the upper left part of a larger one is that image.

B sequences, g trained grid size, N = g * g.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import OnStep, Sampler
from engine.sampling_params import SequenceRequest

_AT_ONCE = 64  # sequences of several windows in one batch, unless a window's candidates are more
OnProgress = Callable[[int], None]
"""Called with the number of positions done, of `num_positions`."""


class TokenGrid(NamedTuple):
    """Rows and columns of image tokens."""

    rows: int
    columns: int


class Window(NamedTuple):
    """A part of the grid, g x g cells. `row` and `column` count windows, `top` and `left` cells."""

    row: int
    column: int
    top: int
    left: int


def window_origins(length: int, g: int) -> list[int]:
    """Where windows of g cells begin along a side of `length` cells, g at least: half a window apart, the last at the end.

    Raises:
        ValueError: a side shorter than a window.
    """
    if length < g:
        raise ValueError(f"{length} cells are fewer than a window's {g}")
    return [*range(0, length - g, max(1, g // 2)), length - g]


def window_batches(grid: TokenGrid, g: int, *, per_batch: int) -> list[list[Window]]:
    """The windows of a grid in an order in which each comes after those that it needs; those of a batch are independent."""
    tops, lefts = window_origins(grid.rows, g), window_origins(grid.columns, g)
    batches = []
    for diagonal in range(len(tops) + len(lefts) - 1):
        windows = [
            Window(row, diagonal - row, top, lefts[diagonal - row])
            for row, top in enumerate(tops)
            if 0 <= diagonal - row < len(lefts)
        ]
        batches += [windows[start : start + per_batch] for start in range(0, len(windows), per_batch)]
    return batches


def window_request(request: SequenceRequest, window: Window) -> SequenceRequest:
    """The request of one window: the same candidate, of a seed that belongs to the request's seed and the window."""
    if window.row == window.column == 0:
        return request
    text = f"{request.seed} window {window.row} {window.column}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return replace(request, sampling_params=request.sampling_params.updated(seed=seed))


def num_positions(grid: TokenGrid, g: int, num_sequences: int) -> int:
    """Positions that `generate_grid` decodes, as it counts them for `on_progress`."""
    return g * g * len(window_batches(grid, g, per_batch=_windows_at_once(num_sequences)))


def generate_grid(
    sampler: Sampler,
    prefix: Prefix,
    requests: Sequence[SequenceRequest],
    grid: TokenGrid,
    *,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Generates grids of image tokens, each side at least the trained one.

    Args:
        prefix: prefilled captions; `request.prefix_index` counts them.
        on_progress: to cancel, raise.

    Returns:
        (B, rows * columns) int64, row by row over the whole grid, on the model's device.

    Raises:
        InputError: as `Sampler.decode`.
        ValueError: a side shorter than the trained one.
    """
    g = sampler.model.config.image_grid_size
    tokens = torch.full((len(requests), *grid), -1, dtype=torch.int64, device=sampler.model.head.weight.device)
    done = 0
    for windows in window_batches(grid, g, per_batch=_windows_at_once(len(requests))):
        parts = [tokens[:, window.top : window.top + g, window.left : window.left + g] for window in windows]
        generated = sampler.decode(
            prefix,
            [window_request(request, window) for window in windows for request in requests],
            init_tokens=None if done == 0 else torch.cat([part.flatten(1) for part in parts]),
            on_step=None if on_progress is None else _counting(on_progress, done),
        )  # (windows * B, N)
        for part, own in zip(parts, generated.split(len(requests)), strict=True):
            part.copy_(own.unflatten(1, (g, g)))
        done += g * g
    return tokens.flatten(1)


def _counting(on_progress: OnProgress, done: int) -> OnStep:
    return lambda position, _: on_progress(done + position + 1)


def _windows_at_once(num_sequences: int) -> int:
    return max(1, _AT_ONCE // num_sequences)
