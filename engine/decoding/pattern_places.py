"""Which cached positions a pattern of attention reads, and where they are kept so that few splits of the cache hold them.

    axial_row    a cell's row lies in one split, whatever came before it
    axial_col    columns are kept one after the other, so that a cell's column lies in one split too
    conv         the five rows of the window: at 16 x 16 two or three of four splits, at 32 x 32 four of sixteen

What is not read would have weight 0: leaving it out changes no bit (benchmarks/pattern_reads.py measures what it saves).

N own positions, g grid size, S splits of `split` places each.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.transformer import AttentionPattern
from engine.models.whole_sequence import pattern_mask

_BY_COLUMN = ("axial_col", "dalle_col")


@dataclass(frozen=True, eq=False)
class PatternPlaces:
    """One pattern over a cache of S splits."""

    place_of: Tensor  # (N,) place of each position
    is_read: Tensor  # (N, S * split) bool: what a query at each position reads, itself included
    is_split_read: Tensor  # (N, S) bool


@functools.lru_cache(maxsize=32)
def pattern_places(
    pattern: AttentionPattern, g: int, num_positions: int, num_splits: int, split: int, device: torch.device
) -> PatternPlaces:
    """Of the first `num_positions` cells of a grid; `pattern` is none but "full"."""
    with torch.inference_mode(False):
        cells = torch.arange(num_positions, dtype=torch.int64, device=device)
        place_of = cells % g * g + cells // g if pattern in _BY_COLUMN else cells
        mask = pattern_mask(pattern, 0, g, device)[:num_positions, :num_positions]
        is_read = torch.zeros(num_positions, num_splits * split, dtype=torch.bool, device=device)
        is_read[:, place_of] = mask
        return PatternPlaces(place_of, is_read, is_read.unflatten(1, (num_splits, split)).any(2))
