"""Token shift while decoding: what the cells above and to the left gave is kept, instead of being computed again.

A branch of a model with `token_shift` reads some channels of its neighbours' normalised inputs (engine/models/whole_sequence.py):
the first quarter from the cell above, the second from the cell to the left. Only these are kept, of the last g cells and a window.

R sequences computed, w window, n rows, L layers, g grid size, C model dim, q = ceil(C / 4), K cells that are kept.
"""

import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig

_MOST_WINDOW = 32  # the same room in every cache, so that a sequence can move from one to another


class ShiftCache:
    """Channels of the cells that later cells take them from.

    A wrong speculation leaves cells behind that are written again before they are read.

    Args:
        num_sequences: how many there is room for.
        window: w, cells of a sequence that are computed together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_sequences: int,
        *,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert window <= _MOST_WINDOW, window
        self._grid_size, self._num_cells = config.image_grid_size, config.image_seq_len
        self._quarter = -(-config.dim // 4)
        self._kept = self._grid_size + _MOST_WINDOW
        shape = (config.num_layers, 2, num_sequences + 1, self._kept, 2 * self._quarter)
        self._cells = torch.zeros(shape, dtype=dtype, device=device)  # the last sequence: cells past the end
        self._sequences = self._places = torch.zeros(0, dtype=torch.int64, device=device)
        self._above = self._left = self._places
        self._has_above = self._has_left = self._places

    def copy_sequence(self, sequence: int, source: "ShiftCache", source_sequence: int) -> None:
        """Takes over what is kept of a sequence."""
        self._cells[:, :, sequence] = source._cells[:, :, source_sequence]

    def begin_step(self, held: Tensor) -> None:
        """Prepares a step of the first R sequences; held (R, w) are the cells that they are at."""
        R, w = held.shape
        cells = held.flatten()
        sequences = torch.arange(R, dtype=torch.int64, device=held.device).repeat_interleave(w)
        self._sequences = torch.where(cells < self._num_cells, sequences, self._cells.shape[2] - 1)
        self._places = cells % self._kept
        self._above, self._left = (cells - self._grid_size) % self._kept, (cells - 1) % self._kept
        self._has_above = (cells >= self._grid_size)[:, None]
        self._has_left = (cells % self._grid_size > 0)[:, None]

    def shift(self, layer: int, branch: int, normed: Tensor, rows: Tensor) -> Tensor:
        """Normalised inputs (n, C) of some rows -> (n, C) with their neighbours' channels.

        Args:
            branch: 0: attention, 1: feed-forward.
            rows: (n,) which of the step's R * w rows they are, ascending: a row's neighbours are rows before it, or kept.
        """
        q, kept = self._quarter, self._cells[layer, branch]
        sequences = self._sequences[rows]
        kept[sequences, self._places[rows]] = normed[:, : 2 * q]
        above = kept[sequences, self._above[rows]][:, :q] * self._has_above[rows]
        left = kept[sequences, self._left[rows]][:, q:] * self._has_left[rows]
        return torch.cat([above, left, normed[:, 2 * q :]], dim=1)
