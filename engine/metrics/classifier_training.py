"""Training of the independent classifier: augmented views of photographs, their features, a linear fit.

Views are mirrored, shifted, cropped and blurred: a codec's images are softer than photographs, and must not look like
another class for that. The fit is convex, so the same views give the same classifier.

B images, S pixels, V views, H features, K classes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.data.augment import augment
from engine.data.caption_classes import CaptionClasses, Facts, find_caption_classes
from engine.data.pairs import Pair, Pairs, load_image
from engine.errors import InputError
from engine.metrics.independent_classifier import IndependentClassifier, agreement, class_name
from engine.metrics.lite0_features import IMAGE_SIZE, Lite0Encoder

_BATCH = 16
_LARGEST_SHIFT = 8  # pixels of 128
_SMALLEST_CROP = 0.85  # of the side
_COARSEST = 0.4  # of the side: as blurred as an image of 51 pixels
# Times the sum of squared weights. On 273 held-out cut-outs in ten classes 0.001 to 0.1 give 88 to 90 % right.
_WEIGHT_PENALTY = 0.03
# An image weighs as its class's frequency to this power. Rare classes: 0.73 right averaged over classes, against 0.70
# without, and no fewer of all images.
_FREQUENCY_POWER = -0.5
_ITERATIONS = 200


def train_classifier(
    pairs: Pairs,
    *,
    views: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[IndependentClassifier, dict[str, Any]]:
    """A classifier of the pairs' caption classes, trained on the training split alone.

    Args:
        views: of each photograph; the first is the photograph as it is.
        seed: of the views.
        on_progress: called with (phase, done, total).

    Returns:
        The classifier, and its record: `trained_on` (images, views, seed) and `held_out`, see `agreement`, with the
        images of each class and how many of them are named rightly.

    Raises:
        InputError: captions without classes, or no held-out photograph of a known class.
    """
    classes = find_caption_classes(pairs)
    if classes is None:
        raise InputError("pairs", "training captions", "state fewer than two classes: there is nothing to tell apart")
    trained_on, labels = _of_known_class(pairs.train, classes)
    held, held_labels = _of_known_class(pairs.validation, classes)
    if not held:
        raise InputError("pairs", "validation split", "has no photograph of a known class: prepare a larger one")
    encoder = Lite0Encoder(device)
    seen = [(pair, view) for view in range(views) for pair in trained_on]
    features = encoder.encode(_batches(seen, seed, device, "training views", on_progress))
    classifier = fit(features, torch.tensor(labels * views, dtype=torch.int64, device="cpu"), classes.facts)
    held_views = _batches([(pair, 0) for pair in held], seed, device, "held-out photographs", on_progress)
    found = classifier.classify(encoder.encode(held_views))
    num, right = Counter(held_labels), Counter(a for a, b in zip(held_labels, found, strict=True) if a == b)
    per_class = [
        {"class": class_name(facts), "images": num[number], "right": right[number]}
        for number, facts in enumerate(classes.facts)
    ]
    return classifier, {
        "trained_on": {"images": len(trained_on), "views": views, "seed": seed},
        "held_out": agreement(found, held_labels) | {"classes": per_class},
    }


def fit(features: Tensor, labels: Tensor, facts: tuple[Facts, ...]) -> IndependentClassifier:
    """The linear classifier with the least mean cross entropy, rare classes weighing more, and penalty, by L-BFGS.

    Args:
        features: (B, H) float32 on the CPU.
        labels: (B,) int64, class numbers.
        facts: of the K classes.
    """
    scale, mean = torch.std_mean(features, dim=0, correction=0)
    scale = scale + 1e-3  # a feature that never varies
    x = (features - mean) / scale
    weight = torch.zeros(x.shape[1], len(facts), dtype=torch.float32, device="cpu", requires_grad=True)
    bias = torch.zeros(len(facts), dtype=torch.float32, device="cpu", requires_grad=True)
    importance = (torch.bincount(labels, minlength=len(facts)).float() / len(labels)).clamp(
        min=1e-6
    ) ** _FREQUENCY_POWER
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(x @ weight + bias, labels, weight=importance) + _WEIGHT_PENALTY * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return IndependentClassifier(facts, mean, scale, weight.detach(), bias.detach())


def view_of(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One augmented view of an image, (S, S, 3) uint8: mirrored, shifted, cropped, blurred, each at random."""
    side = len(image)
    image = augment(image, generator, flip=True, shift=round(_LARGEST_SHIFT * side / IMAGE_SIZE))
    crop = generator.uniform(_SMALLEST_CROP, 1) * side
    left, top = generator.uniform(0, side - crop, size=2)
    coarse = max(1, round(generator.uniform(_COARSEST, 1) * side))
    small = Image.fromarray(image).resize(
        (coarse, coarse), Image.Resampling.BILINEAR, box=(left, top, left + crop, top + crop)
    )
    return np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))


def _of_known_class(pairs: Sequence[Pair], classes: CaptionClasses) -> tuple[list[Pair], list[int]]:
    known = [(pair, number) for pair in pairs if (number := classes.of(pair)) is not None]
    return [pair for pair, _ in known], [number for _, number in known]


def _batches(
    seen: Sequence[tuple[Pair, int]],
    seed: int,
    device: torch.device,
    phase: str,
    on_progress: Callable[[str, int, int], None],
) -> Iterator[Tensor]:
    """(B, 3, S, S) in [0, 1] of (pair, view); view 0 is the photograph itself, others depend on (seed, place)."""
    on_progress(phase, 0, len(seen))
    for start in range(0, len(seen), _BATCH):
        images = []
        for place, (pair, view) in enumerate(seen[start : start + _BATCH], start=start):
            image = load_image(pair, IMAGE_SIZE)
            images.append(image if view == 0 else view_of(image, np.random.default_rng([seed, place])))
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        yield batch.to(device).float() / 255
        on_progress(phase, start + len(images), len(seen))
