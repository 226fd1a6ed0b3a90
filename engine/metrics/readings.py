"""What is read from each candidate of a caption, and from its photograph in the same way: colour, class, oracle, CLIP score.

n images of one caption, S pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.pairs import Pair
from engine.metrics.agreement import ImageReader, Right
from engine.metrics.clip_score import ClipScorer
from engine.metrics.lite0_features import NUM_FEATURES, Lite0Encoder
from engine.metrics.oracle import Oracle
from engine.metrics.oracle import Right as OracleRight
from engine.metrics.parts import EvaluationRun


@dataclass(frozen=True)
class Readings:
    """Of n images, in their order."""

    right: Sequence[Right]
    oracle: Sequence[OracleRight]  # empty without an oracle
    clip: Sequence[float]  # empty without a CLIP

    def first(self, places: Sequence[int]) -> "Readings":
        """Those of some of the images."""
        return Readings(
            [self.right[place] for place in places],
            [self.oracle[place] for place in places] if self.oracle else [],
            [self.clip[place] for place in places] if self.clip else [],
        )

    def measures(self) -> Mapping[str, Sequence[float | None]]:
        """As numbers, right being 1, by the name of what was read; what was not read at all is left out."""

        def numbers(values: Sequence[bool | None]) -> Sequence[float | None]:
            return [None if value is None else float(value) for value in values]

        found: dict[str, Sequence[float | None]] = {
            "colour_agreement": numbers([one.colour for one in self.right]),
            "class_agreement": numbers([one.class_ for one in self.right]),
            "colour_and_class_agreement": numbers([one.both for one in self.right]),
        }
        if self.oracle:
            found["oracle"] = [float(one["all"]) for one in self.oracle]
        if self.clip:
            found["clip_score"] = list(self.clip)
        return {name: values for name, values in found.items() if any(value is not None for value in values)}


@dataclass(frozen=True)
class CandidateReader:
    """Reads images of a caption.

    Attributes:
        colours_and_classes: either may be missing in it.
        encoder: for its classifier; None without one.
    """

    run: EvaluationRun
    colours_and_classes: ImageReader
    encoder: Lite0Encoder | None
    oracle: Oracle | None = None
    clip: ClipScorer | None = None

    def read(self, pair: Pair, images: Sequence[Image.Image]) -> Readings:
        """What n images of the pair's caption show, (S, S) each."""
        pixels = [np.asarray(one) for one in images]
        batches = list(self.run.batches(images))
        features = torch.empty(0, NUM_FEATURES, dtype=torch.float32, device="cpu")
        if self.encoder is not None:
            features = self.encoder.encode(batches)
        return Readings(
            self.colours_and_classes.read(pair, pixels, features),
            self.oracle(pair, images) if self.oracle is not None else [],
            self.clip_scores(pair.captions[0], batches),
        )

    def clip_scores(self, caption: str, batches: Sequence[Tensor]) -> list[float]:
        """CLIP's scores of images, (B, 3, S, S) on the device each, with a caption; none without a CLIP."""
        if self.clip is None:
            return []
        return [score for part in batches for score in self.clip.scores(caption, part)]
