"""The ranker on held-out pairs: its loss, and recall@k, how often the right caption is among an image's k best of a hundred.

B images, T text positions, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.data.pairs import Pair
from engine.data.tokenizer import CaptionTokenizer
from engine.metrics.parts import EvaluationRun
from engine.models.ranker import Ranker

RECALL_AMONG = 100
RECALL_RANKS = (1, 5)
_RECALL_ROUNDS = 20  # of 100 captions, when there are more: the standard error of one is up to 5 points
_LOSS_BATCH = 64  # KoCLIP's loss depends on how many captions compete


@torch.no_grad()
def retrieval(run: EvaluationRun, koclip: Ranker, tokenizer: CaptionTokenizer, held: Sequence[Pair]) -> dict[str, Any]:
    """KoCLIP's loss over batches of `loss_batch`, and recall of the right caption among `recall_among`."""
    text = tokenizer.encode([pair.captions[0] for pair in held], koclip.config.text_seq_len)
    texts = torch.cat([koclip.embed_texts(part.to(run.device)) for part in text.tokens.split(run.batch_size)])
    batches = run.images(held, koclip.config.image_size, "koclip")
    images = torch.cat([koclip.embed_images(part) for part in batches])  # (B, E)
    loss_batch = min(_LOSS_BATCH, len(held))
    order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu")
    groups = [group for group in order.split(loss_batch) if len(group) == loss_batch]
    losses = [float(koclip.loss(images[group], texts[group])) for group in groups]
    return {
        "pairs": len(held),
        "captions_cut": sum(cut > 0 for cut in text.cut),
        "loss": sum(losses) / len(losses),
        "loss_batch": loss_batch,
    } | mean_recall(koclip, images.cpu(), texts.cpu(), text.tokens, run.generator())


def mean_recall(
    koclip: Ranker, images: Tensor, texts: Tensor, tokens: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """Mean recall over rounds; each takes (up to) 100 distinct captions and one image of each, at random.

    Args:
        images: (B, E).
        texts: (B, E).
        tokens: (B, T), which captions are distinct.

    Returns:
        recall_at_1, recall_at_5; recall_among: captions in a round; recall_rounds.
    """
    distinct = num_distinct(tokens)
    among = min(RECALL_AMONG, distinct)
    rounds = (
        1 if distinct == len(tokens) <= RECALL_AMONG else _RECALL_ROUNDS
    )  # without a choice all rounds are the same
    sums = dict.fromkeys(RECALL_RANKS, 0.0)
    for _ in range(rounds):
        order = torch.randperm(len(tokens), generator=generator, dtype=torch.int64, device="cpu")
        # recall_at takes the first `among` distinct captions, so only those rows are scored.
        _, label = torch.unique(tokens[order], dim=0, return_inverse=True)
        first: dict[int, int] = {}
        for row, value in zip(order.tolist(), label.tolist(), strict=True):
            first.setdefault(value, row)
        rows = torch.tensor(list(first.values())[:among], dtype=torch.int64, device="cpu")
        scores = koclip.caption_scores(images[rows], texts[rows])  # image i against caption j
        for rank, share in recall_at(scores, tokens[rows], among=among, ranks=RECALL_RANKS).items():
            sums[rank] += share / rounds
    return {f"recall_at_{rank}": share for rank, share in sums.items()} | {
        "recall_among": among,
        "recall_rounds": rounds,
    }


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
