"""Generations for distances between sets: as many of each held-out caption as it has photographs, those that were ranked among them.

Otherwise rare captions would count as much as common ones, and sets of perfect images would differ.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.distances import PhotographFeatures, inception_scores, nearest_report, set_distances
from engine.metrics.features import FeatureEncoder, ImageFeatures, joined
from engine.metrics.parts import EvaluationRun
from engine.metrics.sheets import Shown, write_nearest_sheet
from engine.pipeline.generation import Generation
from engine.pipeline.pipeline import Pipeline

_BATCH_SEQUENCES = 64  # candidates decoded together: bounds the memory of their KV cache


@dataclass
class DistanceGenerations:
    """The set while it grows: features of a caption's first candidates.

    Attributes:
        needed: caption -> candidates.
    """

    run: EvaluationRun
    encoder: FeatureEncoder
    needed: Counter[str]
    _features: dict[str, ImageFeatures] = field(default_factory=dict)

    @classmethod
    def of(
        cls, run: EvaluationRun, encoder: FeatureEncoder, held: Sequence[Pair], num_images: int
    ) -> "DistanceGenerations":
        """An empty set of `num_images` generations for the captions of held-out pairs, in an order of the run's seed."""
        order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu").tolist()
        return cls(run, encoder, Counter(held[order[place % len(held)]].captions[0] for place in range(num_images)))

    def add(self, generation: Generation) -> None:
        """Takes of a caption's candidates, 0 to n - 1 in any order, those that the set needs."""
        needed = self.needed[generation.caption]
        if needed:
            candidates = sorted(generation.candidates, key=lambda one: one.candidate)[:needed]
            self._features[generation.caption] = self.encode_images([one.image for one in candidates])

    def encode_images(self, images: Sequence[Image.Image]) -> ImageFeatures:
        """Features of images of one size."""
        return self.encoder.encode(self.run.batches(images))

    def completed(self, pipeline: Pipeline) -> ImageFeatures:
        """The whole set; what is lacking is generated, with the candidates' next numbers."""
        run, num_images = self.run, self.needed.total()
        kept = list(self._features.values())
        lacking: dict[range, list[str]] = {}  # candidate numbers -> captions that lack just these, decoded together
        for caption, number in self.needed.items():
            there = len(self._features[caption]) if caption in self._features else 0
            for first in range(there, number, _BATCH_SEQUENCES):
                lacking.setdefault(range(first, min(number, first + _BATCH_SEQUENCES)), []).append(caption)
        params = pipeline.default_sampling_params.updated(seed=run.seed)
        done = sum(map(len, kept))
        run.on_progress("generating for distances", done, num_images)
        for numbers, captions in lacking.items():
            at_once = max(1, _BATCH_SEQUENCES // len(numbers))
            for start in range(0, len(captions), at_once):
                requests = pipeline.prepare(captions[start : start + at_once], params, candidate_numbers=numbers)
                tokens = torch.cat(pipeline.decode(requests))
                kept.append(self.encoder.encode(map(pipeline.decode_images, tokens.split(run.batch_size))))
                done += len(tokens)
                run.on_progress("generating for distances", done, num_images)
        return joined(kept)


def distance_report(
    generations: DistanceGenerations,
    pipeline: Pipeline,
    pairs: Pairs,
    photographs: PhotographFeatures,
    *,
    shown: Sequence[Shown],
    sheets: Path | None,
) -> dict[str, Any]:
    """Figures of the whole set, and of single top-ranked images.

    Args:
        shown: top-ranked images whose nearest training photographs are looked for.
        sheets: where these go side by side, beside this file.

    Returns:
        distances: see `set_distances`; inception_score: see `inception_scores`, under its full name; nearest: with images shown,
        see `nearest_report`, with the photographs' keys and the sheet's name.
    """
    encoder, seed = generations.encoder, generations.run.seed
    generated = generations.completed(pipeline)
    found: dict[str, Any] = {
        "distances": set_distances(photographs, generated, seed=seed),
        encoder.network.figure("inception_score"): inception_scores(encoder, photographs, generated),
    }
    if not shown:
        return found
    report, numbers = nearest_report(photographs, generations.encode_images([one.image for one in shown]))
    nearest_pairs = [pairs.train[number] for number in numbers]
    report["photographs"] = [pair.key for pair in nearest_pairs]
    if sheets is not None:
        size = pipeline.vqgan.config.image_size
        photos = [load_image(pair, size) for pair in nearest_pairs]
        report["sheet"] = write_nearest_sheet(sheets, shown, photos, report["distances"])
    return found | {"nearest": report}
