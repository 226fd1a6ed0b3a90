"""Partial pictures: which rows of tokens are worth one, and what stands where nothing is drawn yet.

Tokens come in raster order, so a partial picture is the VQGAN's decoding of the rows drawn so far:

    drawn      a b c d        the decoder sees all of the grid at once (attention, GroupNorm), so the rows below are
    drawn      e f g h        filled with the last drawn row (a given picture's tokens where there is one), decoded
    filled     e f g h        along, and then painted plain.
    filled     e f g h

g rows and columns of tokens, N = g * g, S pixels.
"""

import torch
from torch import Tensor

# Light grey: neither the white of a product photograph's background nor black.
_PLAIN = 0.93


def preview_rows(count: int, grid_size: int) -> list[int]:
    """After how many drawn rows a picture is shown: at most `count` times, evenly spread, the last row's never.

    >>> preview_rows(3, 16)
    [4, 8, 12]
    """
    count = min(count, grid_size - 1)
    return [max(1, round((number + 1) * grid_size / (count + 1))) for number in range(count)]


def fill_rows(image_tokens: Tensor, *, rows_generated: int, grid_size: int, init_tokens: Tensor | None) -> Tensor:
    """(n,) tokens drawn so far -> (N,), filled up as the module's docstring says.

    Args:
        rows_generated: whole rows, at least 1; what is drawn beyond them is not used.
        init_tokens: (N,), -1 where sampled; None without an init image.
    """
    grid = image_tokens[: rows_generated * grid_size].view(rows_generated, grid_size)
    filled = torch.cat([grid, grid[-1:].expand(grid_size - rows_generated, -1)]).flatten()
    if init_tokens is None:
        return filled
    return torch.where(init_tokens.to(filled.device) >= 0, init_tokens.to(filled.device), filled)


def plain_undrawn(images: Tensor, *, rows_generated: int, grid_size: int, init_tokens: Tensor | None) -> Tensor:
    """(B, 3, S, S) -> the same, plain where a cell is neither drawn nor given."""
    undrawn = torch.arange(grid_size**2, device=images.device) >= rows_generated * grid_size
    if init_tokens is not None:
        undrawn &= init_tokens.to(images.device) < 0
    cell = images.shape[2] // grid_size
    pixels = undrawn.view(grid_size, grid_size).repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (S, S)
    return images.masked_fill(pixels, _PLAIN)
