"""What a VQGAN loses: images against their reconstructions from the codebook.

It bounds every generation (no sequence of image tokens gives what the decoder cannot decode), so it is measured first. The
codebook's used share and perplexity distinguish a small codebook from a large one that has collapsed onto few entries.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.models.image_codec import ImageCodec
from engine.models.quantiser import codebook_stats

# Floor of the mean square error: images of 8 bits are further from their exact values (1.3e-6) anyway, and the PSNR of a
# perfect codec stays a number that JSON can hold.
_LEAST_MSE = 1e-7


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio of values in [0, 1], at most 70."""
    return -10 * math.log10(max(mse, _LEAST_MSE))


@torch.no_grad()
def reconstruction_error(vqgan: ImageCodec, batches: Iterable[Tensor]) -> dict[str, float]:
    """The error of images against their reconstructions.

    Args:
        vqgan: in eval mode.
        batches: images (B, 3, S, S) float in [0, 1], at least one, on the codec's device.

    Returns:
        images: how many.
        mae, mse: mean absolute and mean square error of values in [0, 1].
        psnr_db: of that mse, peak 1, at most 70.
        codebook_used: share of the codebook's entries that occur in any image.
        codebook_perplexity: exp(entropy of the entries' frequencies): 1 to the codebook's size.

    Raises:
        ValueError: no images, or images of another shape.
    """
    absolute = square = 0.0
    num_images = values = 0
    tokens: list[Tensor] = []
    for images in batches:
        image_tokens = vqgan.encode(images)  # (B, N)
        error = (vqgan.decode(image_tokens) - images.float()).double()  # (B, 3, S, S)
        absolute += float(error.abs().sum())
        square += float(error.square().sum())
        values += error.numel()
        num_images += len(images)
        tokens.append(image_tokens.cpu())
    if not num_images:
        raise ValueError("no images to reconstruct")
    stats = codebook_stats(torch.cat(tokens), vqgan.config.codebook_size)
    mse = square / values
    return {
        "images": num_images,
        "mae": absolute / values,
        "mse": mse,
        "psnr_db": psnr_db(mse),
        "codebook_used": float(stats.usage),
        "codebook_perplexity": float(stats.perplexity),
    }
