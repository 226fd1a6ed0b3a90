"""Types of a generation: the request before its tokens are sampled, and the ranked images after.

n candidates, T text positions, N image tokens, S pixels; of larger images H x W pixels and as many tokens as they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.data.prompt_words import PromptWords
from engine.decoding.sliding_window import TokenGrid
from engine.models.real_scores import RealScores
from engine.pipeline.image_size import ImageSize
from engine.pipeline.provenance import ModelRecord, Refinement, RenditionRecord, provenance
from engine.pipeline.ranking import Scores
from engine.sampling_params import RankBy, SamplingParams, SequenceRequest


@dataclass(frozen=True, eq=False)
class PreparedInitImage:
    """An init image as the model takes it, on the model's device."""

    tokens: Tensor  # (N,) int64, -1 where to sample
    pixels: Tensor  # (3, S, S) float32 in [0, 1], the original's
    pasted: Tensor  # (S, S) bool: where candidates get them
    record: dict[str, Any]  # `InitImage.record`


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """One caption, checked and tokenised: what decoding and finishing need."""

    caption: str
    words: PromptWords  # those that the model knows, and those that it does not
    text_tokens: Tensor  # (1, T) int64 on the CPU
    tokens_read: int  # of the caption, [CLS] and [SEP] included
    tokens_cut: int  # that did not fit the model and were left out
    sampling_params: SamplingParams
    candidates: tuple[int, ...]  # numbers of the candidates to generate
    rank_by: RankBy
    init_image: PreparedInitImage | None
    size: ImageSize | None = None  # None: the model's own
    grid: TokenGrid | None = None  # of a larger size
    refinement: Refinement | None = None  # of its images after decoding

    @property
    def init_tokens(self) -> Tensor | None:
        """(N,) tokens that every candidate keeps, -1 where to sample."""
        return None if self.init_image is None else self.init_image.tokens

    def sequences(self, prefix_index: int = 0) -> list[SequenceRequest]:
        """A sequence a candidate, of a caption that is read as prefix `prefix_index`."""
        return [SequenceRequest(prefix_index, self.sampling_params, candidate=number) for number in self.candidates]

    def provenance(
        self, model: ModelRecord, candidate: int, *, rendition: RenditionRecord | None = None
    ) -> dict[str, Any]:
        """How the image of a candidate was made by `model`; `rendition` of its file, None: as it was generated."""
        return provenance(
            model,
            self.caption,
            self.sampling_params,
            candidate,
            rank_by=self.rank_by,
            init_image=None if self.init_image is None else self.init_image.record,
            rendition=rendition,
            size=self.size,
            refinement=self.refinement,
        )


@dataclass(frozen=True)
class Candidate:
    """One image of a caption."""

    candidate: int
    seed: int
    image_tokens: tuple[int, ...]  # N
    image: Image.Image
    score: float | None  # KoCLIP's; None when the model has no ranker
    rank: int  # 1 is best; without a ranker, the order of the candidates
    contrast: float | None = None  # nats, see engine/pipeline/ranking.py; None unless ranked by it
    log_likelihood: float | None = None  # nats, see engine/pipeline/likelihood.py; None unless ranked by it
    # Per cent of real pairs below, by certainty where candidates are ranked by contrast, else by score; None without scores, and for a caption of which the model knows no word:
    # its score would be that of no caption.
    score_percentile: float | None = None

    @property
    def ranked_by(self) -> float | None:
        """The value that its rank follows; None without a ranker."""
        return next((own for own in (self.log_likelihood, self.contrast, self.score) if own is not None), None)


@dataclass(frozen=True)
class Generation:
    """All images of a caption, best first."""

    request: PreparedRequest
    candidates: tuple[Candidate, ...]
    timings_s: dict[str, float]  # of the whole call: prefill (init image included), decode, vqgan, ranking

    @property
    def caption(self) -> str:
        return self.request.caption

    @property
    def tokens_cut(self) -> int:
        return self.request.tokens_cut

    @property
    def init_tokens(self) -> tuple[int, ...] | None:
        """N tokens, -1 where they were sampled: what an init image fixed in every candidate."""
        tokens = self.request.init_tokens
        return None if tokens is None else tuple(tokens.tolist())

    def top(self, count: int) -> tuple[Candidate, ...]:
        return self.candidates[:count]


def batch_init_tokens(requests: Sequence[PreparedRequest], num_tokens: int, device: torch.device) -> Tensor | None:
    """(B, N) of all candidates of all requests, -1 where to sample; None without init images."""
    if all(request.init_tokens is None for request in requests):
        return None
    none = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
    tokens = [none if request.init_tokens is None else request.init_tokens for request in requests]
    return torch.cat([own.expand(len(request.candidates), -1) for own, request in zip(tokens, requests, strict=True)])


def ranked(
    request: PreparedRequest,
    tokens: Tensor,
    pixels: Tensor,
    scores: Scores | None,
    log_likelihoods: Tensor | None,
    real_scores: RealScores | None = None,
) -> tuple[Candidate, ...]:
    """Best first, by log-likelihood where there is one, else by contrast, else by score; equals in the candidates' order.

    Args:
        tokens: (n, N).
        pixels: (n, S, S, 3) or (n, H, W, 3) uint8.
        log_likelihoods: (n,).
        real_scores: what the scores are compared with.
    """
    # A refined image's score was the goal: it says nothing beside those of real pairs.
    compared = None if request.words.num_known == 0 or request.refinement is not None else real_scores
    order = list(range(len(pixels)))
    score, contrast, certainty = (
        (None, None, None) if scores is None else (scores.score, scores.contrast, scores.certainty)
    )
    keys = next((own for own in (log_likelihoods, contrast, score) if own is not None), None)
    if keys is not None:
        order.sort(key=lambda index: -float(keys[index]))
    return tuple(
        Candidate(
            candidate=request.candidates[index],
            seed=request.sampling_params.seed,
            image_tokens=tuple(tokens[index].tolist()),
            image=Image.fromarray(pixels[index].numpy()),
            score=None if score is None else float(score[index]),
            rank=rank,
            contrast=None if contrast is None else float(contrast[index]),
            log_likelihood=None if log_likelihoods is None else float(log_likelihoods[index]),
            score_percentile=None
            if compared is None or score is None
            else compared.percentile(float(score[index]), None if certainty is None else float(certainty[index])),
        )
        for rank, index in enumerate(order, start=1)
    )
