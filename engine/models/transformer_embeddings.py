"""Input embeddings of the transformer: caption tokens, image tokens, and the grid cells that inputs must predict.

B sequences, T positions, C model dim, g grid size, n image tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.transformer import TransformerConfig

BOS_ID = 0
PAD_ID = 1


class TextEmbedding(nn.Module):
    """<bos> and caption tokens -> vectors: token row + position row, rows counted from 0, no LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.unique_from = config.text_vocab_size if config.unique_padding else None
        self.bos = config.bos
        # padding_idx keeps row 1 of both tables without a gradient, where they come from a language model.
        self.padding_idx = None if config.unique_padding or not config.bos else PAD_ID
        rows = config.text_vocab_size + (config.text_seq_len if config.unique_padding else 0)
        self.tokens = nn.Parameter(torch.randn(rows, config.dim, dtype=torch.float32))
        has_positions = not config.rotary and config.condition == "text"
        shape = (config.text_position_rows, config.dim)
        self.positions = nn.Parameter(torch.randn(shape, dtype=torch.float32)) if has_positions else None
        self.zero_padding()

    def forward(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids from [CLS] on -> (B, 1 + T, C); without <bos> (B, T, C)."""
        text_tokens = F.pad(self.numbered(text_tokens), (int(self.bos), 0), value=BOS_ID)
        tokens = F.embedding(text_tokens, self.tokens, padding_idx=self.padding_idx)
        if self.positions is None:
            return tokens
        positions = torch.arange(text_tokens.shape[1], dtype=torch.int64, device=text_tokens.device)
        return tokens + F.embedding(positions, self.positions, padding_idx=self.padding_idx)

    def numbered(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids, with unique padding those of padded positions instead of 0; doing it twice changes nothing."""
        if self.unique_from is None:
            return text_tokens
        positions = torch.arange(text_tokens.shape[1], dtype=text_tokens.dtype, device=text_tokens.device)
        return torch.where(text_tokens == 0, self.unique_from + positions, text_tokens)

    @torch.no_grad()
    def zero_padding(self) -> None:
        """The initialisation of nn.Embedding(padding_idx=1)."""
        for table in (self.tokens, self.positions):
            if self.padding_idx is not None and table is not None:
                table[self.padding_idx].zero_()


class ImageEmbedding(nn.Module):
    """Image tokens -> vectors: token row + grid row + grid column (axial positions, summed), or + a row of a table of cells."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.grid_size = config.image_grid_size
        self.tokens = nn.Parameter(torch.randn(config.image_vocab_size, config.dim, dtype=torch.float32))
        is_learned = config.image_positions == "learned"
        self.rows = None if config.rotary or is_learned else _table(config.image_grid_size, config.dim)
        self.columns = None if config.rotary or is_learned else _table(config.image_grid_size, config.dim)
        self.cells = _table(config.image_seq_len, config.dim) if is_learned and not config.rotary else None

    def forward(self, image_tokens: Tensor, cells: Tensor | None = None) -> Tensor:
        """(B, n) ids of the grid cells (B, n), by default the first n; n may be 0 -> (B, n, C)."""
        table = self.position_table()
        positions = table[: image_tokens.shape[1]] if cells is None else F.embedding(cells, table)
        return F.embedding(image_tokens, self.tokens) + positions

    def position_table(self) -> Tensor:
        """(image_seq_len, C): position embedding of each grid cell, row by row."""
        if self.cells is not None:
            return self.cells
        if self.rows is None or self.columns is None:  # rotary: positions are in the attention
            return self.tokens.new_zeros(self.grid_size**2, self.tokens.shape[1])
        return _axial_table(self.rows, self.columns)


class TargetEmbedding(nn.Module):
    """The grid cell that an input must predict -> a vector that is added to it (RAR, arXiv 2411.00776).

    Tables of its own, axial as the positions of the inputs. RAR learns a vector for each of the g * g cells; these are
    2 * g vectors, each of which is learned from g times as many tokens.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(config.image_grid_size, config.dim, dtype=torch.float32))
        self.columns = nn.Parameter(torch.randn(config.image_grid_size, config.dim, dtype=torch.float32))

    def forward(self, n: int, cells: Tensor | None = None) -> Tensor:
        """Cells (B, n) -> (B, n, C); None: the first n, row by row -> (1, n, C)."""
        table = self.position_table()
        return table[None, :n] if cells is None else F.embedding(cells, table)

    def position_table(self) -> Tensor:
        """(image_seq_len, C)."""
        return _axial_table(self.rows, self.columns)


def _table(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, dim, dtype=torch.float32))


def _axial_table(rows: Tensor, columns: Tensor) -> Tensor:
    """(g, C) each -> (g * g, C): row + column of each cell, row by row."""
    return (rows[:, None] + columns[None]).flatten(0, 1)
