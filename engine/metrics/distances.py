"""How far generations are from photographs: figures of the set, and the nearest training photograph of single ones.

All are measured in the features of one network, and all need something beside them. A set of images that the codec has
only reconstructed is as near as a transformer can come: its distance is the floor. FID shrinks with the number of images, so
each row states its numbers; `reconstructed_training_images` has as many as `generations`, other photographs than the held-out
ones they are compared with, and is the fair floor there. The nearest photograph of a held-out photograph is as near as a
picture comes that copies nothing; the nearest of a reconstructed training photograph is as near as a copy.

B images, H features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.data.pairs import Pair, Pairs
from engine.metrics.features import FeatureEncoder, ImageFeatures, same_network
from engine.metrics.fid import feature_distances
from engine.metrics.inception_score import inception_score
from engine.metrics.parts import EvaluationRun
from engine.models.image_codec import ImageCodec

_AT_ONCE = 1024  # rows of a distance matrix


@dataclass(frozen=True)
class PhotographFeatures:
    """Features of photographs and of their reconstructions, in the order of the pairs."""

    held_out: ImageFeatures
    reconstructed_held_out: ImageFeatures
    training: ImageFeatures
    reconstructed_training: ImageFeatures  # the first so many, in an order of the run's seed
    reconstructed: tuple[int, ...]  # their numbers among the training pairs

    @property
    def originals(self) -> ImageFeatures:
        """Of the training photographs that were reconstructed."""
        return self.training.rows(self.reconstructed)


def photograph_features(
    run: EvaluationRun,
    vqgan: ImageCodec,
    decode: Callable[[Tensor], Tensor],
    encoder: FeatureEncoder,
    pairs: Pairs,
    *,
    num_reconstructed: int,
) -> PhotographFeatures:
    """Features of the held-out and the training photographs at the model's size, as they are and as its codec has them.

    Args:
        decode: the codec's decoder, (B, N) -> (B, 3, S, S): the pipeline's fast one, or `vqgan.decode`.
        num_reconstructed: training photographs that the codec reconstructs; all when there are fewer.
    """
    size = vqgan.config.image_size

    def of(some: Sequence[Pair], phase: str) -> ImageFeatures:
        return encoder.encode(run.images(some, size, phase))

    def reconstructed(some: Sequence[Pair], phase: str) -> ImageFeatures:
        with torch.no_grad():
            images = run.images(some, size, phase)
            return encoder.encode(decode(vqgan.encode(each)) for each in images)

    order = torch.randperm(len(pairs.train), generator=run.generator(), dtype=torch.int64, device="cpu")
    chosen = order[:num_reconstructed].tolist()
    return PhotographFeatures(
        of(pairs.validation, "features of held-out photographs"),
        reconstructed(pairs.validation, "features of reconstructed held-out photographs"),
        of(pairs.train, "features of training photographs"),
        reconstructed([pairs.train[number] for number in chosen], "features of reconstructed training photographs"),
        tuple(chosen),
    )


def reconstruction_distances(photographs: PhotographFeatures, *, seed: int) -> dict[str, Any]:
    """Reconstruction FID and its kin: photographs against themselves as the codec has them.

    Returns:
        held_out; training_images, which the codec learnt from, but there are more of them. Each as `feature_distances`.
    """
    return {
        "held_out": feature_distances(photographs.held_out, photographs.reconstructed_held_out, seed=seed),
        "training_images": feature_distances(photographs.originals, photographs.reconstructed_training, seed=seed),
    }


def set_distances(photographs: PhotographFeatures, generated: ImageFeatures, *, seed: int) -> dict[str, Any]:
    """FID, KID, precision and recall of generations against held-out and against training photographs, with the floors of each.

    Args:
        seed: of KID's subsets.

    Returns:
        to_held_out: of generations; of the same photographs, reconstructed (the smallest floor: reconstruction FID); of as
            many training photographs as there are generations, and of these reconstructed (the fair floor);
        to_training: of generations; of held-out photographs, and of these reconstructed.
        Each as `feature_distances`.
    """
    photos = photographs

    def rows(real: ImageFeatures, **others: ImageFeatures) -> dict[str, Any]:
        return {name: feature_distances(real, other, seed=seed) for name, other in others.items()}

    return {
        "to_held_out": rows(
            photos.held_out,
            generations=generated,
            reconstructed_held_out=photos.reconstructed_held_out,
            training_images=photos.originals,
            reconstructed_training_images=photos.reconstructed_training,
        ),
        "to_training": rows(
            photos.training,
            generations=generated,
            held_out=photos.held_out,
            reconstructed_held_out=photos.reconstructed_held_out,
        ),
    }


def inception_scores(
    encoder: FeatureEncoder, photographs: PhotographFeatures, generated: ImageFeatures
) -> dict[str, dict[str, Any]]:
    """The Inception Score of generations, of as many training photographs and of these reconstructed; of the held-out ones.

    Each as `engine.metrics.inception_score`. Compare rows of one number of images.
    """
    sets = {
        "generations": generated,
        "training_images": photographs.originals,
        "reconstructed_training_images": photographs.reconstructed_training,
        "held_out": photographs.held_out,
        "reconstructed_held_out": photographs.reconstructed_held_out,
    }
    return {name: inception_score(encoder.class_logits(features)) for name, features in sets.items()}


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


def nearest_report(photographs: PhotographFeatures, generated: ImageFeatures) -> tuple[dict[str, Any], list[int]]:
    """Distances of generations to their nearest training photographs, beside those of photographs.

    Returns:
        generations, held_out, reconstructed_held_out, reconstructed_training_images: least, median and most of the
            distances to the nearest training photograph; for the last the distance to the photograph itself;
        as_near_as_copies: generations that are nearer than the median reconstruction is to its own original;
        and the numbers of the nearest training photographs.
    """
    same_network(photographs.training, generated)
    training = photographs.training.values
    distances, numbers = nearest(generated.values, training)
    own = photographs.originals.values - photographs.reconstructed_training.values
    copies = own.square().sum(dim=1).sqrt()
    return {
        "generations": _spread(distances),
        "held_out": _spread(nearest(photographs.held_out.values, training)[0]),
        "reconstructed_held_out": _spread(nearest(photographs.reconstructed_held_out.values, training)[0]),
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
