"""Previews: after which rows of tokens they are sent, and how the missing rows are filled.

Tokens are sampled in raster order, so a preview is the VQGAN's decoding of the rows generated so far:

    generated  a b c d        the VQGAN's decoder sees the whole grid (attention, GroupNorm), so the missing rows are
    generated  e f g h        filled with the last generated row (or the init image's tokens), decoded together with the
    filled     e f g h        others, and then replaced by a plain colour.
    filled     e f g h

g rows and columns of tokens, N = g * g, S pixels.
"""

import torch
from torch import Tensor

# Light grey, to differ from the white background of product photographs and from black.
_PLAIN = 0.93


def preview_rows(count: int, grid_size: int) -> list[int]:
    """Numbers of generated rows after which a preview is due: at most `count`, evenly spread, never all rows.

    >>> preview_rows(3, 16)
    [4, 8, 12]
    """
    count = min(count, grid_size - 1)
    return [max(1, round((number + 1) * grid_size / (count + 1))) for number in range(count)]


def fill_rows(image_tokens: Tensor, *, rows_generated: int, grid_size: int, init_tokens: Tensor | None) -> Tensor:
    """(n,) tokens sampled so far -> (N,), filled as described in the module's docstring.

    Args:
        rows_generated: complete rows, at least 1; tokens beyond them are not used.
        init_tokens: (N,), -1 where tokens are sampled; None without an init image.
    """
    grid = image_tokens[: rows_generated * grid_size].view(rows_generated, grid_size)
    filled = torch.cat([grid, grid[-1:].expand(grid_size - rows_generated, -1)]).flatten()
    if init_tokens is None:
        return filled
    return torch.where(init_tokens.to(filled.device) >= 0, init_tokens.to(filled.device), filled)


def blank_missing(images: Tensor, *, rows_generated: int, grid_size: int, init_tokens: Tensor | None) -> Tensor:
    """(B, 3, S, S) images, plain in cells that are neither generated nor part of the init image."""
    missing = torch.arange(grid_size**2, device=images.device) >= rows_generated * grid_size
    if init_tokens is not None:
        missing &= init_tokens.to(images.device) < 0
    cell = images.shape[2] // grid_size
    pixels = missing.view(grid_size, grid_size).repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (S, S)
    return images.masked_fill(pixels, _PLAIN)
