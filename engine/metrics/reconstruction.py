"""What a VQGAN loses: pictures against their way through the codebook and back.

It bounds every drawing (no sequence of image tokens can draw what the decoder cannot), so it is measured first. The
codebook's share and perplexity tell a small codebook from a large one that has collapsed onto few entries.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.models.quantiser import codebook_stats
from engine.models.vqgan import Vqgan

# Of the square error: pictures of 8 bits differ from their exact values by more than this (1.3e-6) anyway, and a
# perfect codec stays a number that JSON can hold.
_LEAST_MSE = 1e-7


@torch.no_grad()
def reconstruction_error(vqgan: Vqgan, batches: Iterable[Tensor]) -> dict[str, float]:
    """Measures pictures against their reconstructions.

    Args:
        vqgan: in eval mode.
        batches: pictures (B, 3, S, S) float in [0, 1], at least one, on the codec's device.

    Returns:
        pictures: how many.
        mae, mse: mean absolute and mean square error of values in [0, 1].
        psnr_db: of that mse, peak 1, at most 70.
        codebook_used: share of the codebook's entries that occur in any picture.
        codebook_perplexity: exp(entropy of the entries' frequencies): 1 to the codebook's size.

    Raises:
        ValueError: no pictures, or pictures of another shape.
    """
    absolute = square = 0.0
    pictures = values = 0
    tokens: list[Tensor] = []
    for images in batches:
        image_tokens = vqgan.encode(images)  # (B, N)
        error = (vqgan.decode(image_tokens) - images.float()).double()  # (B, 3, S, S)
        absolute += float(error.abs().sum())
        square += float(error.square().sum())
        values += error.numel()
        pictures += len(images)
        tokens.append(image_tokens.cpu())
    if not pictures:
        raise ValueError("no pictures to reconstruct")
    stats = codebook_stats(torch.cat(tokens), vqgan.config.codebook_size)
    mse = square / values
    return {
        "pictures": pictures,
        "mae": absolute / values,
        "mse": mse,
        "psnr_db": -10 * math.log10(max(mse, _LEAST_MSE)),
        "codebook_used": float(stats.usage),
        "codebook_perplexity": float(stats.perplexity),
    }
