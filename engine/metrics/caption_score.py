"""How well a model's generations fit held-out captions, in one number, for choosing between two models of one training."""

from pathlib import Path

from engine.data.pairs import load_pairs
from engine.device import pick_device
from engine.pipeline.pipeline import Pipeline

_CAPTIONS, _CANDIDATES = 12, 8


def caption_score(model: Path, pairs: Path, *, seed: int) -> float:
    """Mean score of the model's own ranker for random candidates of the first distinct held-out captions, 12 at most.

    Args:
        model: folder with a transformer and a ranker.
        pairs: with held-out ones.
    """
    captions = list(dict.fromkeys(pair.captions[0] for pair in load_pairs(pairs).validation))[:_CAPTIONS]
    generations = Pipeline.from_pretrained(model, device=pick_device(""))(captions, candidates=_CANDIDATES, seed=seed)
    scores = [one.score for generation in generations for one in generation.candidates if one.score is not None]
    assert scores, "the model has a ranker"
    return sum(scores) / len(scores)
