"""What KoCLIP's training compares: pairs, words with cells of images, and two views of an image.

    contrastive   a caption with the images of the batch, and an image with its captions: InfoNCE, as CLIP (arXiv:2103.00020), or
                  decoupled (DCL, arXiv:2110.06848)
    tokens        similarity of a caption and an image from those of their parts (FILIP, arXiv:2111.07783)
    views         NT-Xent (SimCLR, arXiv:2002.05709), and SimSiam (arXiv:2011.10566)

All of them see the pairs of all ranks when their rows were gathered before (`gather_rows`).

Shapes: B pairs, B' images without a caption, M captions, T text tokens, P cells of an image, E width of the shared space.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES_AT_ONCE = 1 << 27  # cosines of words and cells in memory: 512 MiB


def contrastive_loss(to_images: Tensor, to_captions: Tensor, *, decoupled: bool = False) -> Tensor:
    """Mean over both directions of how hard it is to find a pair's other half.

    Args:
        to_images: (B, B + B') logits of each caption for each image; image i is caption i's, -inf is left out.
        to_captions: (B, M) logits of each image for each caption, M >= B, alike.
        decoupled: the pair itself is left out of the denominator: its gradient is no longer scaled down by how likely it is
            already, which small batches suffer from.

    Returns:
        scalar float32.
    """
    pairs = torch.arange(len(to_images), dtype=torch.int64, device=to_images.device)
    loss = _decoupled if decoupled else F.cross_entropy
    return (loss(to_images, pairs) + loss(to_captions, pairs)) / 2


def _decoupled(logits: Tensor, pairs: Tensor) -> Tensor:
    """Mean of log(sum over negatives of exp) - positive: (B, M), (B,) -> scalar; 0 for a row without a negative."""
    negatives = logits.scatter(1, pairs[:, None], -math.inf)
    has_some = (negatives > -math.inf).any(dim=1)
    # Rows without any are replaced before, not after: the gradient of logsumexp over nothing is nan.
    spread = torch.where(has_some[:, None], negatives, 0.0).logsumexp(dim=1)
    own = logits.gather(1, pairs[:, None]).squeeze(1)
    return torch.where(has_some, spread - own, 0.0).mean()


def token_similarities(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of images and captions by their parts, in both directions.

    Args:
        images: (B, P, E), cells of unit length.
        texts: (M, T, E), tokens of unit length; those that do not count are all zeros.

    Returns:
        (M, B), mean over a caption's tokens of the cosine with the most similar cell: images for a caption.
        (B, M), mean over an image's cells of the cosine with the most similar token: captions for an image.
    """
    P, T = images.shape[1], texts.shape[1]
    at_once = max(1, _SIMILARITIES_AT_ONCE // max(1, len(images) * P * T))
    parts = [_token_similarities(images, part) for part in texts.split(at_once)]
    return torch.cat([to_images for to_images, _ in parts]), torch.cat([to_captions for _, to_captions in parts], dim=1)


def _token_similarities(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    counts = (texts != 0).any(dim=-1)  # (M, T)
    cosines = torch.einsum("mte,bpe->mbtp", texts, images)
    # A token that does not count is 0 with every cell, and adds nothing to the sum.
    to_images = cosines.amax(dim=3).sum(dim=2) / counts.sum(dim=1, keepdim=True).clamp(min=1)  # (M, B)
    of_cells = cosines.masked_fill(~counts[:, None, :, None], -math.inf).amax(dim=2)  # (M, B, P)
    return to_images, of_cells.mean(dim=2).T


def own_token_similarities(images: Tensor, texts: Tensor) -> Tensor:
    """`token_similarities` of captions of each image's own, to find it: (B, P, E), (B, K, T, E) -> (B, K)."""
    counts = (texts != 0).any(dim=-1)  # (B, K, T)
    cosines = torch.einsum("bkte,bpe->bktp", texts, images)
    return cosines.masked_fill(~counts[..., None], -math.inf).amax(dim=2).mean(dim=2)


def nt_xent(projections: Tensor, *, temperature: float) -> Tensor:
    """SimCLR's loss: each view finds the other one of its image among all other views. (B, 2, E) -> scalar.

    Cosines over the temperature, as in the paper (x-clip, whose option this is, has bare products).
    """
    rows = F.normalize(projections.float(), dim=-1).transpose(0, 1).flatten(0, 1)  # (2B, E), first views first
    B = len(projections)
    logits = rows @ rows.T / temperature
    logits = logits.masked_fill(torch.eye(2 * B, dtype=torch.bool, device=rows.device), -math.inf)
    others = torch.arange(2 * B, dtype=torch.int64, device=rows.device).roll(B)
    return F.cross_entropy(logits, others)


def simsiam(predictions: Tensor, projections: Tensor) -> Tensor:
    """SimSiam's loss: each view's prediction is the other view's projection, which gets no gradient. (B, 2, E) twice -> scalar.

    The sum over both views of 2 - 2 * cosine, as x-clip weighs it: 0 to 8.
    """
    targets = projections.detach().flip(1)
    cosines = F.cosine_similarity(predictions.float(), targets.float(), dim=-1)  # (B, 2)
    return (2 - 2 * cosines).sum(dim=1).mean()


def gather_rows(rows: Tensor) -> Tensor:
    """(B, …) on each rank -> (ranks * B, …) on every rank, rank by rank; the rows themselves without a process group.

    Losses of gathered rows are those of the whole batch on every rank, and gradients averaged over ranks, as data
    parallelism does, are those of one process with the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    """Backward needs no communication: every rank computes the same loss from the same rows, so the sum over ranks of
    the gradients is `ranks` times the gradient of this rank.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        return gradient.chunk(ranks)[dist.get_rank()] * ranks
