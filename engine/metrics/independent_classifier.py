"""The caption class that an image shows, by an independent classifier.

The classifier is a KoCLIP that scores an image against the caption of every class. It must be another KoCLIP than the one
that ranks, trained from another seed: a ranker picks the candidate that it scores highest, and would confirm itself. No
classifier is always right, so read its agreement beside that on real photographs.

B images, K classes, E embedding width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.data.caption_classes import CaptionClasses
from engine.data.tokenizer import CaptionTokenizer
from engine.models.koclip import KoClip


class IndependentClassifier:
    """A KoCLIP that assigns images to caption classes.

    Args:
        koclip: in eval mode, on the device of the images.
    """

    def __init__(self, koclip: KoClip, tokenizer: CaptionTokenizer, classes: CaptionClasses) -> None:
        self.classes = classes
        self._koclip = koclip
        tokens = tokenizer.encode(classes.captions, koclip.config.text_seq_len).tokens
        with torch.no_grad():
            self._texts = koclip.embed_texts(tokens.to(next(koclip.parameters()).device))  # (K, E)

    @torch.no_grad()
    def classify(self, batches: Iterable[Tensor]) -> list[int]:
        """Class numbers, one an image.

        Args:
            batches: images (B, 3, any, any) float in [0, 1].
        """
        numbers: list[int] = []
        for images in batches:
            scores = self._koclip.scores(self._koclip.embed_images(images), self._texts)  # (K, B)
            numbers += scores.argmax(dim=0).tolist()
        return numbers
