"""What a model folder says of its captions, renewed from the pairs that it was trained on: words, synonyms, scores of real pairs.

Training writes the words and synonyms into captions.json itself. The scores of real pairs need the ranker that ends up in the
folder, so they are measured once that is there, and again whenever it is exchanged.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.data.caption_guide import CaptionGuide, read_guide, write_guide
from engine.data.pairs import Pair, caption_guide, load_pairs
from engine.device import fit_to_machine, pick_device
from engine.errors import InputError
from engine.metrics.parts import EvaluationRun, OnPhaseProgress
from engine.models.folder_config import weights_digest
from engine.models.real_scores import RealScores, real_scores, write_real_scores
from engine.pipeline.pipeline import Pipeline

_MOST_PAIRS = 1_000  # more do not move a percentile by two
_BATCH_SIZE, _SEED = 16, 7


def calibrate(
    model: Path, pairs_folder: Path, *, device: str = "", on_progress: OnPhaseProgress | None = None
) -> tuple[CaptionGuide, RealScores | None]:
    """Renews captions.json and real_scores.json of a model folder.

    Of captions.json: the words of the training captions, and the synonyms, of which those that the folder has stay.

    Args:
        pairs_folder: what the model was trained on; its validation split is scored.

    Returns:
        The guide, and the scores of real pairs, None for a model without a ranker.

    Raises:
        InputError: no model with a transformer, no pairs, none held out.
    """
    pairs = load_pairs(pairs_folder)
    if not pairs.validation:
        raise InputError(
            "pairs", pairs_folder, "none of them is held out: give the folder that the model was trained on"
        )
    fit_to_machine()
    pipeline = Pipeline.from_pretrained(model, device=pick_device(device), dtype=torch.float32)
    found, held = caption_guide(pairs.train), read_guide(model)
    guide = held.model_copy(update={"words": found.words, "synonyms": found.synonyms | held.synonyms})
    scores = None
    if pipeline.koclip is not None:
        run = EvaluationRun(pipeline.device, _SEED, _BATCH_SIZE, on_progress or (lambda *_: None))
        table, certainties = _scores(run, pipeline, pairs.validation)
        scores = real_scores(table, ranker=weights_digest(model, "koclip"), certainties=certainties)
        write_real_scores(model, scores)
    write_guide(model, guide)
    return guide, scores


def _scores(run: EvaluationRun, pipeline: Pipeline, held: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """The ranker's scores of held-out photographs with their own captions, and the certainty of those that have a contrast."""
    order = torch.randperm(len(held), generator=run.generator(), dtype=torch.int64, device="cpu").tolist()
    chosen = [held[number] for number in sorted(order[:_MOST_PAIRS])]
    found: list[float] = []
    certainties: list[float] = []
    for images in run.images(chosen, pipeline.vqgan.config.image_size, "scores of real pairs"):
        for pair, image in zip(chosen[len(found) : len(found) + len(images)], images, strict=True):
            scores = pipeline.candidate_scores(pair.captions[0], image[None])
            assert scores is not None, "the model has a ranker"
            found.append(float(scores.score))
            if scores.certainty is not None:
                certainties.append(float(scores.certainty))
    return found, certainties
