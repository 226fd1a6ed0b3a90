"""CLIP score: how well images fit their captions, by a CLIP that had no part in making or ranking them.

    100 * max(cos(image, caption), 0), averaged

The cosine of one pair says little: unrelated pairs of OpenAI's ViT-B/32 are at about 15 to 20, fitting ones at 25 to 35. Read the mean
beside those of real photographs and of photographs of other captions. Only figures of the same CLIP and the same language may be compared.

Source: Hessel et al. 2021, arXiv:2104.08718 (which multiplies by 2.5 instead of 100).

n images of one caption, S pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.data.caption_grammar import CaptionGrammar
from engine.data.tokenizer import CaptionTokenizer
from engine.models.ranker import Ranker

SCALE = 100.0


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP of its own, in eval mode on a device.

    Attributes:
        name: of its folder, for reports.
        weights: digest.
        english: captions are read in the grammar's English: for a CLIP that knows no Korean. None: as they are.
    """

    network: Ranker
    tokenizer: CaptionTokenizer
    name: str
    weights: str
    english: CaptionGrammar | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "weights": self.weights, "captions": "as written" if self.english is None else "in English",
        }  # fmt: skip

    @torch.no_grad()
    def scores(self, caption: str, images: Tensor) -> list[float]:
        """Scores of images, (n, 3, S, S) float in [0, 1] on the network's device, with one caption."""
        text = caption if self.english is None else self.english.in_english(caption)
        tokens = self.tokenizer.encode([text], self.network.config.text_seq_len).tokens.to(images.device)
        cosines = self.network.scores(self.network.embed_images(images), self.network.embed_texts(tokens))[0]
        found: list[float] = (SCALE * cosines.float().clamp(min=0)).tolist()
        return found


def clip_report(
    scorer: ClipScorer,
    real: Sequence[float],
    other: Sequence[float],
    top_ranked: Sequence[float],
    every: Sequence[float],
) -> dict[str, Any]:
    """Mean scores of captions with images.

    Args:
        real: with each caption's own photograph.
        other: with another caption's photograph.
        top_ranked: with the image that the model's ranker puts first.
        every: with all candidates.

    Returns:
        name, weights, captions (as written, or in English); real, real_of_another_caption, top_ranked, random.
    """
    sets = {"real": real, "real_of_another_caption": other, "top_ranked": top_ranked, "random": every}
    return scorer.describe() | {name: sum(some) / len(some) if some else None for name, some in sets.items()}
