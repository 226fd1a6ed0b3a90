"""What a drawing is made of: where it starts, its candidates, their order.

G captions, n candidates each, N image tokens, S pixels.
"""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """One picture of a caption."""

    candidate: int
    seed: int
    image_tokens: tuple[int, ...]  # N
    image: Image.Image
    score: float | None  # KoCLIP's; None when the model has no ranker
    rank: int  # 1 is best; without a ranker, the order drawn
    fit: float | None = None  # nats, see engine/pipeline/likelihood.py; None unless ranked by it


@dataclass(frozen=True)
class Generation:
    """All pictures of a caption, best first."""

    caption: str
    tokens_cut: int  # text tokens that did not fit the model and were left out
    candidates: tuple[Candidate, ...]
    timings_s: dict[str, float]  # of the whole call: prefill (a given picture's encoding too), decode, vqgan, ranking
    init_tokens: tuple[int, ...] | None = None  # N, -1 where drawn: what a given picture fixed in every candidate

    def top(self, count: int) -> tuple[Candidate, ...]:
        return self.candidates[:count]


@dataclass(frozen=True, eq=False)
class Start:
    """A given picture as the model takes it."""

    tokens: Tensor  # (N,), -1 where to draw
    pixels: Tensor  # (3, S, S) float in [0, 1], the original's
    pasted: Tensor  # (S, S) bool: where candidates get them


def ranked(
    seed: int, tokens: Tensor, pixels: Tensor, scores: Tensor | None, fits: Tensor | None
) -> tuple[Candidate, ...]:
    """Best first, by fit where there is one, else by score; equals in the order drawn.

    Args:
        tokens: (n, N).
        pixels: (n, S, S, 3) uint8.
        scores, fits: (n,).
    """
    order = list(range(len(pixels)))
    keys = scores if fits is None else fits
    if keys is not None:
        order.sort(key=lambda number: -float(keys[number]))
    return tuple(
        Candidate(
            candidate=number,
            seed=seed,
            image_tokens=tuple(tokens[number].tolist()),
            image=Image.fromarray(pixels[number].numpy()),
            score=None if scores is None else float(scores[number]),
            rank=rank,
            fit=None if fits is None else float(fits[number]),
        )
        for rank, number in enumerate(order, start=1)
    )
