"""What an evaluation works on: the parts of a model folder, and the images of pairs batch by batch.

B images, S pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.pairs import Pair, load_image
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.models.folder import load_part, load_ranker_tokenizer
from engine.models.folder_config import PartName, has_part
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.pipeline.pipeline import Pipeline

PARTS: tuple[PartName, ...] = ("vqgan", "transformer", "koclip")

OnPhaseProgress = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Parts:
    """The parts of a folder, in eval mode on one device.

    `pipeline` is not None when the folder has a transformer, `tokenizer`, the ranker's, when it has a transformer or a ranker.
    """

    vqgan: ImageCodec | None
    koclip: Ranker | None
    pipeline: Pipeline | None
    tokenizer: CaptionTokenizer | None
    device: torch.device


@dataclass(frozen=True)
class EvaluationRun:
    """Device, seed and batch size, the same for all measurements."""

    device: torch.device
    seed: int
    batch_size: int
    on_progress: OnPhaseProgress

    def generator(self) -> torch.Generator:
        """A new generator for every choice, so that none depends on which parts were measured before."""
        return torch.Generator("cpu").manual_seed(self.seed)

    def batches(self, images: Sequence[Image.Image]) -> Iterator[Tensor]:
        """Images of one size as (B, 3, S, S) float in [0, 1] on the device, in order."""
        for start in range(0, len(images), self.batch_size):
            pixels = np.stack([np.asarray(one) for one in images[start : start + self.batch_size]])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device).float() / 255

    def images(self, pairs: Sequence[Pair], image_size: int, phase: str) -> Iterator[Tensor]:
        """(B, 3, S, S) float in [0, 1] on the device, in order; a batch counts as done when the next is taken."""
        self.on_progress(phase, 0, len(pairs))
        for start in range(0, len(pairs), self.batch_size):
            batch = np.stack([load_image(pair, image_size) for pair in pairs[start : start + self.batch_size]])
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).to(self.device).float() / 255
            self.on_progress(phase, start + len(batch), len(pairs))


def load_parts(folder: Path, device: torch.device) -> Parts:
    """All parts of a model folder.

    Raises:
        InputError: no parts, or a part that does not load or does not fit the others, by name.
    """
    held = [name for name in PARTS if has_part(folder, name)]
    if not held:
        raise InputError("model folder", folder, f"holds none of {', '.join(PARTS)}: export the model again")
    if "transformer" in held:
        pipeline = Pipeline.from_pretrained(folder, device=device, dtype=torch.float32)
        return Parts(pipeline.vqgan, pipeline.koclip, pipeline, pipeline.ranker_tokenizer, device)
    vqgan = load_part(folder, "vqgan").to(device) if "vqgan" in held else None
    koclip = load_part(folder, "koclip").to(device) if "koclip" in held else None
    return Parts(vqgan, koclip, None, load_ranker_tokenizer(folder) if koclip is not None else None, device)
