"""Do images show what their captions state: the colour, read from pixels, and the class, by the independent classifier.

Every share stands beside that of real photographs, read alike, and beside that of a candidate taken at random.

G captions, n candidates of each, H features.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from engine.data.caption_classes import CaptionClasses, commonest_share
from engine.data.formats import colour_attribute_of
from engine.data.pairs import Pair, Pairs, load_image
from engine.metrics.colour import ColourReader, fit_colour_reader
from engine.metrics.independent_classifier import LEAST_ACCURACY, IndependentClassifier, agreement
from engine.metrics.lite0_features import Lite0Encoder
from engine.metrics.parts import EvaluationRun


@dataclass(frozen=True)
class ColourNames:
    """The colours that a set's captions name, read like those of its training photographs."""

    attribute: str
    reader: ColourReader

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.reader.names)

    def stated(self, pair: Pair) -> str | None:
        """The colour that a pair states; None if it states none, several, or one that no training photograph has."""
        value = _one_colour(pair, self.attribute)
        return value if value in self.names else None

    def of(self, image: np.ndarray) -> str:
        """The name of an image's colour."""
        return self.reader.name_of(image)


def colour_names(pairs: Pairs, size: int) -> ColourNames | None:
    """The colours that the training pairs' attributes name, from their images at `size` pixels; None if they name none."""
    attribute = colour_attribute_of(pair.attributes for pair in pairs.train)
    if attribute is None:
        return None
    named = [(pair, name) for pair in pairs.train if (name := _one_colour(pair, attribute)) is not None]
    images = [load_image(pair, size) for pair, _ in named]
    return ColourNames(attribute, fit_colour_reader(images, [name for _, name in named])) if named else None


def _one_colour(pair: Pair, attribute: str) -> str | None:
    value = pair.attributes.get(attribute)
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class Right:
    """Whether an image shows what its caption states; None where the caption states nothing of the kind."""

    colour: bool | None
    class_: bool | None

    @property
    def both(self) -> bool | None:
        return None if self.colour is None or self.class_ is None else self.colour and self.class_


@dataclass(frozen=True)
class ImageReader:
    """What can be read from an image: its colour, its class; either may be missing."""

    names: ColourNames | None
    classifier: IndependentClassifier | None
    classes: CaptionClasses | None

    def read(self, pair: Pair, images: Sequence[np.ndarray], features: Tensor) -> list[Right]:
        """Whether images show what a pair's caption states.

        Args:
            images: (S, S, 3) uint8 each.
            features: (len(images), H), of engine.metrics.lite0_features; not looked at without a classifier.
        """
        colour = self.names.stated(pair) if self.names is not None else None
        colours: list[bool | None] = [None] * len(images)
        if self.names is not None and colour is not None:
            colours = [self.names.of(image) == colour for image in images]
        matching = self.classes.matching(pair) if self.classes is not None else frozenset[int]()
        right: list[bool | None] = [None] * len(images)
        if self.classifier is not None and matching:
            right = [number in matching for number in self.classifier.classify(features)]
        return [Right(*both) for both in zip(colours, right, strict=True)]

    def report(
        self, held: Sequence[Pair], real: Sequence[Right], generated: Sequence[Sequence[Right]]
    ) -> dict[str, Any]:
        """Shares of images that agree with their captions.

        Args:
            held: all held-out pairs.
            real: of the photograph of each.
            generated: of the candidates of each caption, best first.

        Returns:
            colour_agreement, class_agreement, colour_and_class_agreement, each where it can be read, with the shares of
            `_shares`; `commonest` in the first two is the best constant answer.
        """
        found: dict[str, Any] = {}
        if self.names is not None:
            stated = Counter(name for pair in held if (name := self.names.stated(pair)) is not None)
            found["colour_agreement"] = {
                "attribute": self.names.attribute,
                "names": len(self.names.names),
                "commonest": max(stated.values()) / stated.total() if stated else None,
            } | _shares(real, generated, lambda right: right.colour)
        if self.classifier is not None and self.classes is not None:
            matching = [classes for pair in held if (classes := self.classes.matching(pair))]
            found["class_agreement"] = {
                "classes": len(self.classes.facts),
                "commonest": commonest_share(matching),
            } | _shares(real, generated, lambda right: right.class_)
            if self.names is not None:
                found["colour_and_class_agreement"] = _shares(real, generated, lambda right: right.both)
        return found


def classifier_trust(
    run: EvaluationRun,
    encoder: Lite0Encoder,
    classifier: IndependentClassifier,
    classes: CaptionClasses,
    held: Sequence[Pair],
    image_size: int,
) -> dict[str, Any]:
    """How often the classifier is right about held-out photographs at the model's size; `left_out` says when its word is
    worth nothing."""
    known = [(pair, number) for pair in held if (number := classes.of(pair)) is not None]
    if not known:
        return {"images": 0, "usable": False, "left_out": "no held-out photograph has a class of the training captions"}
    images = run.images([pair for pair, _ in known], image_size, "independent classifier")
    found = agreement(classifier.classify(encoder.encode(images)), [number for _, number in known])
    if not found["usable"]:
        found["left_out"] = f"fewer than {LEAST_ACCURACY:.0%} of held-out photographs named rightly: worth nothing"
    return found


def _shares(
    real: Sequence[Right], generated: Sequence[Sequence[Right]], part: Callable[[Right], bool | None]
) -> dict[str, Any]:
    """Of captions that state it: shares of right photographs, top-ranked images, and images taken at random."""
    photographs = [right for one in real if (right := part(one)) is not None]
    captions = [[part(one) for one in candidates] for candidates in generated]
    stating = [[bool(right) for right in rights] for rights in captions if None not in rights]
    top, random = _share([rights[0] for rights in stating]), _share([right for rights in stating for right in rights])
    return {
        "real": _share(photographs),
        "num_real": len(photographs),
        "top_ranked": top,
        "random": random,
        "top_ranked_minus_random": None if top is None or random is None else top - random,
        "num_captions": len(stating),
    }


def _share(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) if right else None
