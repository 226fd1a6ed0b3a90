"""The caption class that an image shows, by a classifier that has no part in making or ranking it.

A linear classifier on features of a frozen EfficientNet-Lite0 (engine.metrics.lite0_features), trained on photographs by
`kodalle train-classifier`. A ranker picks the candidate that it scores highest, and would confirm itself. No classifier is
always right: read its shares beside that of real photographs; below `LEAST_ACCURACY` on these they mean nothing.

A folder holds `classifier.json` (classes, how it was trained, how often it is right) and `classifier.safetensors`.

B images, H features, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.data.caption_classes import CaptionClasses, Facts
from engine.data.caption_grammar import Fact
from engine.errors import InputError
from engine.files import atomic_folder, check_folder_place, read_json, write_json
from engine.metrics.lite0_features import IMAGE_SIZE, NUM_FEATURES

LEAST_ACCURACY = 0.8
_FORMAT = 1
_FEATURES = f"efficientnet-lite0, {IMAGE_SIZE} pixels"
_JSON, _WEIGHTS = "classifier.json", "classifier.safetensors"
_TRAIN = "make it with `kodalle train-classifier`"


@dataclass(frozen=True)
class IndependentClassifier:
    """A linear classifier of standardised features; float32 on the CPU.

    Args:
        facts: of each class.
        mean, scale: (H,), of the training features.
        weight: (H, K).
        bias: (K,).
    """

    facts: tuple[Facts, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def classify(self, features: Tensor) -> list[int]:
        """(B, H) features -> class numbers, one an image."""
        numbers: list[int] = self._logits(features).argmax(dim=1).tolist()
        return numbers

    def _logits(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale @ self.weight + self.bias

    def for_classes(self, classes: CaptionClasses, *, folder: Path) -> "IndependentClassifier":
        """The same classifier with its classes in the order of `classes`.

        Raises:
            InputError: it knows other classes.
        """
        if set(self.facts) != set(classes.facts):
            other = sorted(set(self.facts) ^ set(classes.facts))[0]
            remedy = f"knows {len(self.facts)} classes, the pairs have {len(classes.facts)}: train one on these pairs"
            raise InputError("--independent-classifier", f"{folder}: {class_name(other)}", remedy)
        order = [self.facts.index(facts) for facts in classes.facts]
        return IndependentClassifier(classes.facts, self.mean, self.scale, self.weight[:, order], self.bias[order])


def agreement(found: Sequence[int], classes: Sequence[int]) -> dict[str, Any]:
    """How often a classifier is right about photographs whose class is known, at least one.

    Args:
        found: its class number of each.
        classes: the right ones.

    Returns:
        images; accuracy; balanced_accuracy, the mean over classes, which a rare class moves as much as a common one;
        majority, the share of the commonest class: what a constant answer gets; usable: accuracy reaches LEAST_ACCURACY.
    """
    by_class: dict[int, list[bool]] = {}
    for one, right in zip(found, classes, strict=True):
        by_class.setdefault(right, []).append(one == right)
    accuracy = sum(one == right for one, right in zip(found, classes, strict=True)) / len(classes)
    return {
        "images": len(classes),
        "accuracy": accuracy,
        "balanced_accuracy": sum(sum(own) / len(own) for own in by_class.values()) / len(by_class),
        "majority": max(len(own) for own in by_class.values()) / len(classes),
        "usable": accuracy >= LEAST_ACCURACY,
    }


def class_name(facts: Facts) -> str:
    """A class in words, for reports: the values of its facts."""
    return ", ".join(fact.value for fact in facts)


def check_classifier_place(folder: Path) -> None:
    """Raises InputError: a classifier cannot be written into the folder, or it holds something else."""
    check_folder_place(folder, field="--out", holds=_JSON, what="a classifier")


def save_classifier(folder: Path, classifier: IndependentClassifier, record: Mapping[str, Any]) -> None:
    """Writes a classifier's folder, or replaces one.

    Args:
        record: how it was trained and how often it is right, fit for JSON.

    Raises:
        InputError: the folder holds something else.
    """
    check_classifier_place(folder)
    with atomic_folder(folder, replace=True) as temporary:
        weights = {name: getattr(classifier, name).contiguous() for name in ("mean", "scale", "weight", "bias")}
        save_file(weights, temporary / _WEIGHTS)
        (temporary / _WEIGHTS).chmod(0o644)  # from 0600
        write_json(
            temporary / _JSON,
            {"format": _FORMAT, "features": _FEATURES, "classes": classifier.facts, **record},
        )


def load_classifier(folder: Path) -> IndependentClassifier:
    """The classifier of a folder.

    Raises:
        InputError: no such folder, or files that are not of this form.
    """
    field = "--independent-classifier"
    tree = read_json(folder / _JSON, field=field, remedy=_TRAIN)
    if not isinstance(tree, dict) or (tree.get("format"), tree.get("features")) != (_FORMAT, _FEATURES):
        raise InputError(field, folder / _JSON, f"is not of format {_FORMAT} on {_FEATURES}: {_TRAIN}")
    try:
        facts = tuple(tuple(Fact(*fact) for fact in facts) for facts in tree["classes"])
        weights = load_file(folder / _WEIGHTS)
    except (KeyError, TypeError, FileNotFoundError, SafetensorError) as error:
        raise InputError(field, folder, f"is not complete ({error}): {_TRAIN}") from error
    shapes = {
        "mean": (NUM_FEATURES,),
        "scale": (NUM_FEATURES,),
        "weight": (NUM_FEATURES, len(facts)),
        "bias": (len(facts),),
    }
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != shapes:
        raise InputError(field, folder / _WEIGHTS, f"has tensors {found}, not {shapes}: {_TRAIN}")
    return IndependentClassifier(facts, **{name: weights[name].to(torch.float32) for name in shapes})
