"""The Inception Score: are images clearly of some class each, and of many classes together?

    IS = exp(mean over images of KL(p(class | image) || p(class)))      p(class): mean over the same images

1 where all images look alike to the classifier, at most the smaller of its classes and the images. It never looks at real images,
and classes of ImageNet say little about garments: read it beside that of as many photographs. With few images it is too small.

Source: Salimans et al. 2016, arXiv:1606.03498; splits as torch-fidelity makes them.

B images, K classes.
"""

import numpy as np
import torch
from torch import Tensor

SPLITS = 10  # of the paper and of torch-fidelity, for 50,000 images
LEAST_IN_SPLIT = 500
_SHUFFLING_SEED = 2020  # torch-fidelity's


def inception_score(logits: Tensor, *, splits: int | None = None) -> dict[str, float | int | None]:
    """The score of a set of images.

    Args:
        logits: (B, K), at least one.
        splits: the images are shuffled and split, the score is the mean over splits. None: 10 where each has 500 images or more,
            else 1: small splits make the score smaller.

    Returns:
        images, splits; mean; std over the splits, None for one.
    """
    count = len(logits)
    splits = splits or (SPLITS if count >= SPLITS * LEAST_IN_SPLIT else 1)
    order = np.random.RandomState(_SHUFFLING_SEED).permutation(count)  # its own generator: nothing global is touched
    log_p = logits[torch.from_numpy(order)].double().log_softmax(dim=1)
    scores = []
    for number in range(splits):
        part = log_p[number * count // splits : (number + 1) * count // splits]
        p = part.exp()
        scores.append(float((p * (part - p.mean(dim=0).log())).sum(dim=1).mean().exp()))
    return {
        "images": count, "splits": splits, "mean": float(np.mean(scores)), "std": float(np.std(scores)) if splits > 1 else None,
    }  # fmt: skip
