"""How far generations are from photographs: FID and KID of the set, and the nearest training photograph of single ones.

Both are measured in features of EfficientNet-Lite0, and both need something beside them. A set of images that the codec has
only reconstructed is as near as a transformer can come: its distance is the floor. FID shrinks with the number of images, so
each row states its numbers; `reconstructed_training_images` has as many as `generations`, other photographs than the held-out
ones they are compared with, and is the fair floor there. The nearest photograph of a held-out photograph is as near as a
picture comes that copies nothing; the nearest of a reconstructed training photograph is as near as a copy.

B images, H features (1280).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.data.pairs import Pair, Pairs
from engine.metrics.fid import feature_distances
from engine.metrics.lite0_features import Lite0Encoder, head_mean
from engine.metrics.parts import EvaluationRun
from engine.pipeline.pipeline import Pipeline

_AT_ONCE = 1024  # rows of a distance matrix


@dataclass(frozen=True)
class PhotographFeatures:
    """Features of photographs and of their reconstructions, each (B, H), in the order of the pairs."""

    held_out: Tensor
    reconstructed_held_out: Tensor
    training: Tensor
    reconstructed_training: Tensor  # the first so many, in an order of the run's seed
    reconstructed: tuple[int, ...]  # their numbers among the training pairs


def photograph_features(
    run: EvaluationRun, pipeline: Pipeline, encoder: Lite0Encoder, pairs: Pairs, *, num_reconstructed: int
) -> PhotographFeatures:
    """Features of the held-out and the training photographs at the model's size, as they are and as its codec has them.

    Args:
        num_reconstructed: training photographs that the codec reconstructs; all when there are fewer.
    """
    size = pipeline.vqgan.config.image_size

    def of(some: Sequence[Pair], phase: str) -> Tensor:
        return head_mean(encoder.encode(run.images(some, size, phase)))

    def reconstructed(some: Sequence[Pair], phase: str) -> Tensor:
        with torch.no_grad():
            images = run.images(some, size, phase)
            return head_mean(encoder.encode(pipeline.decode_images(pipeline.vqgan.encode(each)) for each in images))

    order = torch.randperm(len(pairs.train), generator=run.generator(), dtype=torch.int64, device="cpu")
    chosen = order[:num_reconstructed].tolist()
    return PhotographFeatures(
        of(pairs.validation, "features of held-out photographs"),
        reconstructed(pairs.validation, "features of reconstructed held-out photographs"),
        of(pairs.train, "features of training photographs"),
        reconstructed([pairs.train[number] for number in chosen], "features of reconstructed training photographs"),
        tuple(chosen),
    )


def set_distances(photographs: PhotographFeatures, generated: Tensor, *, seed: int) -> dict[str, Any]:
    """FID and KID of generations against held-out and against training photographs, with the floors of each.

    Args:
        generated: (B, H).
        seed: of KID's subsets.

    Returns:
        to_held_out: of generations; of the same photographs, reconstructed (the smallest floor); of as many training
            photographs as there are generations, and of these reconstructed (the fair floor);
        to_training: of generations; of held-out photographs, and of these reconstructed.
        Each as `feature_distances`.
    """
    photos = photographs

    def rows(real: Tensor, **others: Tensor) -> dict[str, Any]:
        return {name: feature_distances(real, other, seed=seed) for name, other in others.items()}

    return {
        "to_held_out": rows(
            photos.held_out,
            generations=generated,
            reconstructed_held_out=photos.reconstructed_held_out,
            training_images=photos.training[list(photos.reconstructed)],
            reconstructed_training_images=photos.reconstructed_training,
        ),
        "to_training": rows(
            photos.training,
            generations=generated,
            held_out=photos.held_out,
            reconstructed_held_out=photos.reconstructed_held_out,
        ),
    }


def nearest(features: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `to` for each of `features`, by Euclidean distance.

    Args:
        features: (B, H).
        to: (B', H), at least one.

    Returns:
        distances (B,) and numbers (B,) int64.
    """
    parts = [
        torch.cdist(part, to, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        for part in features.split(_AT_ONCE)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nearest_report(photographs: PhotographFeatures, generated: Tensor) -> tuple[dict[str, Any], list[int]]:
    """Distances of generations to their nearest training photographs, beside those of photographs.

    Args:
        generated: (B, H).

    Returns:
        generations, held_out, reconstructed_held_out, reconstructed_training_images: least, median and most of the
            distances to the nearest training photograph; for the last the distance to the photograph itself;
        as_near_as_copies: generations that are nearer than the median reconstruction is to its own original;
        and the numbers of the nearest training photographs.
    """
    distances, numbers = nearest(generated, photographs.training)
    own = photographs.training[list(photographs.reconstructed)] - photographs.reconstructed_training
    copies = own.square().sum(dim=1).sqrt()
    return {
        "generations": _spread(distances),
        "held_out": _spread(nearest(photographs.held_out, photographs.training)[0]),
        "reconstructed_held_out": _spread(nearest(photographs.reconstructed_held_out, photographs.training)[0]),
        "reconstructed_training_images": _spread(copies),
        "as_near_as_copies": int((distances < copies.median()).sum()),
        "distances": [round(float(each), 4) for each in distances],
    }, numbers.tolist()


def _spread(distances: Tensor) -> dict[str, float]:
    return {
        "least": float(distances.min()),
        "median": float(distances.median()),
        "most": float(distances.max()),
    }
