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
    """<bos> and caption tokens -> vectors: token row + position row, rows counted from 0, no LayerNorm.

    Tables of another width W than the model's, a language model's, are projected: (token row + position row) P^T, P (C, W).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.unique_from = config.text_vocab_size if config.unique_padding else None
        self.padding_id = config.padding_id
        self.bos = config.bos
        # padding_idx keeps a row of the tables without a gradient, where they come from a language model; in RoBERTa's row 1
        # of the position table, too.
        self.padding_idx = None if config.unique_padding or not config.bos else config.padding_id
        self.position_padding_idx = PAD_ID if self.padding_idx == PAD_ID else None
        rows = config.text_vocab_size + (config.text_seq_len if config.unique_padding else 0)
        width = config.text_embedding_dim or config.dim
        self.tokens = _table(rows, width)
        has_positions = not config.rotary and config.condition == "text"
        self.positions = _table(config.text_position_rows, width) if has_positions else None
        self.projection: nn.Parameter | None = None
        if config.text_embedding_dim is not None:
            self.projection = nn.Parameter(torch.empty(config.dim, width, dtype=torch.float32))
            # Keeps angles, as far as C vectors can, and the size of the numbers.
            nn.init.orthogonal_(self.projection, gain=max(1.0, config.dim / width) ** 0.5)
        self.zero_padding()

    def forward(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids from [CLS] on -> (B, 1 + T, C); without <bos> (B, T, C)."""
        text_tokens = F.pad(self.numbered(text_tokens), (int(self.bos), 0), value=BOS_ID)
        x = F.embedding(text_tokens, self.tokens, padding_idx=self.padding_idx)
        if self.positions is not None:
            positions = torch.arange(text_tokens.shape[1], dtype=torch.int64, device=text_tokens.device)
            x = x + F.embedding(positions, self.positions, padding_idx=self.position_padding_idx)
        return self._projected(x)

    def at(self, text_tokens: Tensor, position: int) -> Tensor:
        """(R,) ids, all at one position that counts <bos> -> (R, C); not for models with unique padding."""
        assert self.unique_from is None
        x = self.tokens[text_tokens]
        return self._projected(x if self.positions is None else x + self.positions[position])

    def _projected(self, x: Tensor) -> Tensor:
        return x if self.projection is None else F.linear(x, self.projection)

    def numbered(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids, with unique padding those of padded positions instead of padding; doing it twice changes nothing."""
        if self.unique_from is None:
            return text_tokens
        positions = torch.arange(text_tokens.shape[1], dtype=text_tokens.dtype, device=text_tokens.device)
        return torch.where(text_tokens == self.padding_id, self.unique_from + positions, text_tokens)

    def tables(self) -> list[nn.Parameter]:
        """Token table and, where there is one, position table."""
        return [self.tokens] if self.positions is None else [self.tokens, self.positions]

    @torch.no_grad()
    def zero_padding(self) -> None:
        """The initialisation of nn.Embedding(padding_idx=…)."""
        if self.padding_idx is not None:
            self.tokens[self.padding_idx].zero_()
        if self.position_padding_idx is not None and self.positions is not None:
            self.positions[self.position_padding_idx].zero_()


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
