"""What DALLE-pytorch's switches make of a whole sequence: token shift, rotary positions, attention patterns of images.

All three need to know where a position lies in [<bos>, text, image], and token shift also the vectors before it. Here they are for
sequences that are read from their start; decoding has its own of single cells (engine/decoding/{shift_cache,pattern_places}.py).

P = 1 + text positions, g grid size, N = g * g image positions, n positions so far, D head dim.
Source: lucidrains/DALLE-pytorch `transformer.py`, `attention.py`; rotary_embedding_torch.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.transformer import AttentionPattern, TransformerConfig

_FAR = 8192.0  # text position of all image tokens
_OUTSIDE = -10.0  # of text on the image's axes, which span -1 to 1
_THETA, _MAX_FREQUENCY = 10000.0, 10.0
_WINDOW = 5  # cells along a side of the convolution-like pattern
_DALLE_WINDOW = 11  # of DALL-E's own (arXiv 2102.12092, appendix B.1)


def shift_tokens(x: Tensor, config: TransformerConfig) -> Tensor:
    """Each position takes some channels of its neighbours: (B, n, C) -> (B, n, C).

    Text: the first half from the position before. Image: the first quarter from the cell above, the second from the cell to the
    left; zeros where there is none.
    """
    P, g = config.prefix_len, config.image_grid_size
    text, image = x[:, :P], x[:, P:]
    moved, kept = text.chunk(2, dim=-1)
    text = torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], dim=-1)
    missing = g * g - image.shape[1]
    cells = F.pad(image, (0, 0, 0, missing)).unflatten(1, (g, g))  # (B, g, g, C)
    above, left, *rest = cells.chunk(4, dim=-1)
    cells = torch.cat([F.pad(above, (0, 0, 0, 0, 1, -1)), F.pad(left, (0, 0, 1, -1)), *rest], dim=-1)
    return torch.cat([text, cells.flatten(1, 2)[:, : image.shape[1]]], dim=1)


def rotated(heads: Tensor, config: TransformerConfig) -> Tensor:
    """Queries, keys or values with their positions: (B, n, H, D) -> (B, n, H, D); the channels after the angles' stay."""
    angles = rotary_angles(config.prefix_len, config.image_grid_size, config.head_dim, heads.device)[
        : heads.shape[1], None
    ]
    return turned(heads, angles.cos().to(heads.dtype), angles.sin().to(heads.dtype))


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels (..., D), turned by angles whose cosines and sines broadcast with the first channels."""
    first, kept = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    even, odd = first[..., ::2], first[..., 1::2]
    across = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([first * cos + across * sin, kept], dim=-1)


def turns_of_cells(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(2, N, channels): cosines and sines of each cell's angles; None: the model is not rotary."""
    if not config.rotary:
        return None
    angles = rotary_angles(config.prefix_len, config.image_grid_size, config.head_dim, device)[config.prefix_len :]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


@functools.lru_cache(maxsize=8)
def rotary_angles(P: int, g: int, head_dim: int, device: torch.device) -> Tensor:
    """(P + N, 3 * 2 * (D // 6)) float32: text position, row and column of each position, each in a third of the channels."""
    with torch.inference_mode(False):  # the cached tensor is for training too
        return _rotary_angles(P, g, head_dim).to(device)


def _rotary_angles(P: int, g: int, head_dim: int) -> Tensor:
    pairs = head_dim // 3 // 2
    words = 1.0 / _THETA ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device="cpu")[:pairs] / (head_dim // 3))
    pixels = torch.linspace(1.0, _MAX_FREQUENCY / 2, pairs, dtype=torch.float32, device="cpu") * math.pi
    text = torch.cat(
        [
            torch.arange(P, dtype=torch.float32, device="cpu"),
            torch.full((g * g,), _FAR, dtype=torch.float32, device="cpu"),
        ]
    )
    axis = torch.linspace(-1, 1, g, dtype=torch.float32, device="cpu")
    outside = torch.full((P,), _OUTSIDE, dtype=torch.float32, device="cpu")
    rows = torch.cat([outside, axis.repeat_interleave(g)])
    columns = torch.cat([outside, axis.repeat(g)])
    parts = [(text, words), (rows, pixels), (columns, pixels)]
    angles = [torch.outer(positions, frequencies).repeat_interleave(2, dim=1) for positions, frequencies in parts]
    return torch.cat(angles, dim=1)


@functools.lru_cache(maxsize=16)
def pattern_mask(pattern: AttentionPattern, P: int, g: int, device: torch.device) -> Tensor:
    """(P + N, P + N) bool: which position may attend to which. Text is causal in all, and images attend to all of it."""
    with torch.inference_mode(False):  # the cached tensor is for training too
        return _pattern_mask(pattern, P, g).to(device)


def _pattern_mask(pattern: AttentionPattern, P: int, g: int) -> Tensor:
    index = torch.arange(P + g * g, dtype=torch.int64, device="cpu")
    causal = index[:, None] >= index
    cells = index[P:] - P
    row, column = cells // g, cells % g
    down, right = row[:, None] - row, column[:, None] - column  # from the attended cell to the attending one
    back, reach = cells[:, None] - cells, _DALLE_WINDOW // 2  # back: in raster order, past the ends of rows
    window = [a * g + b for a in range(reach + 1) for b in range(-reach, reach + 1)]
    near = {
        "axial_row": down == 0,
        "axial_col": right == 0,
        "conv": (down >= 0) & (down < _WINDOW) & (right >= 0) & (right < _WINDOW),
        "conv_symmetric": (down.abs() <= _WINDOW // 2) & (right.abs() <= _WINDOW // 2),
        "dalle_row": back <= g,  # to the cell right above
        "dalle_col": right == 0,
        "dalle_conv": torch.isin(back, torch.tensor(window, dtype=torch.int64, device="cpu")),
        "full": torch.ones_like(down, dtype=torch.bool),
    }[pattern]
    mask = causal.clone()
    mask[P:, P:] &= near
    return mask
