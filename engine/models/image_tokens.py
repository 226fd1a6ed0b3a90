"""Checks and lookups that every codec family shares: images in, image tokens in.

B images, C channels, S pixels, N = h*w image tokens, K codes, E width of an entry.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.codec import CodecConfig


def check_images(images: Tensor, *, channels: int, size: int) -> None:
    """Raises ValueError: anything but (B, channels, size, size) floats."""
    if images.dim() != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"images must be (B, {channels}, {size}, {size}), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be float in [0, 1], not {images.dtype}")


def likeliest_codes(scores: Tensor) -> Tensor:
    """The code of each position without noise, row by row: scores of the codes (B, K, h, w) -> (B, N) int64."""
    return scores.argmax(dim=1).flatten(1)


def check_tokens(image_tokens: Tensor, codebook_size: int) -> Tensor:
    """The tokens as int64.

    Raises:
        ValueError: not integers, or a token outside 0..K-1. Checked here because on a GPU the embedding would destroy the
            CUDA context of the process instead.
    """
    if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
        raise ValueError(f"image tokens must be integers, not {image_tokens.dtype}")
    image_tokens = image_tokens.long()
    if image_tokens.numel():
        lowest, highest = (int(value) for value in torch.stack(torch.aminmax(image_tokens)).tolist())
        if lowest < 0 or highest >= codebook_size:
            raise ValueError(f"image tokens span {lowest}..{highest}; the codebook has 0..{codebook_size - 1}")
    return image_tokens


def token_grid(image_tokens: Tensor, table: Tensor, config: CodecConfig) -> Tensor:
    """Rows of a table in the tokens' places: (B, N) integers, (K, E) -> (B, E, h, w).

    Raises:
        ValueError: wrong shape, or as `check_tokens`.
    """
    N, grid = config.image_seq_len, config.grid_size
    if image_tokens.dim() != 2 or image_tokens.shape[1] != N:
        raise ValueError(f"image tokens must be (B, {N}), got {tuple(image_tokens.shape)}")
    entries = F.embedding(check_tokens(image_tokens, config.codebook_size), table)  # (B, N, E)
    return entries.view(len(entries), grid, grid, -1).permute(0, 3, 1, 2)
