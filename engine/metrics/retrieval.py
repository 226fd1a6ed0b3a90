"""Recall@k: how often the right caption is among an image's k best of a hundred."""

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at(scores: Tensor, captions: Tensor, *, among: int, ranks: Sequence[int]) -> dict[int, float]:
    """Share of images whose own caption is among the best `rank` of `among` different captions.

    Captions repeat in small sets; two equal ones cannot be distinguished, so each distinct caption takes part once, and an
    image counts as right when its caption's text wins. Images are taken in order until `among` distinct captions are
    gathered; if there are fewer, all take part (the caller reports how many there were).

    Args:
        scores: (B, B), image i against the caption of pair j.
        captions: (B, T) text tokens of the pairs.
        among: number of distinct captions.
        ranks: e.g. (1, 5).
    """
    _, label = torch.unique(captions, dim=0, return_inverse=True)  # (B,) caption number of each pair
    first: dict[int, int] = {}
    for index, value in enumerate(label.tolist()):
        if value not in first and len(first) < among:
            first[value] = index
    columns = torch.tensor(list(first.values()), dtype=torch.int64, device="cpu")  # one pair for each distinct caption
    rows = columns
    kept = scores.cpu()[rows][:, columns]  # (n, n), right answers on the diagonal
    own = kept.diagonal()[:, None]
    # Captions that beat the right one; ties count as beaten, or a model with equal scores for all would be right. So do NaNs.
    better = (~(kept < own)).sum(dim=1) - 1  # the right one itself is among them
    return {rank: float((better < rank).float().mean()) for rank in ranks}


def num_distinct(captions: Tensor) -> int:
    """Distinct captions among (B, T) text tokens."""
    return len(torch.unique(captions, dim=0))
