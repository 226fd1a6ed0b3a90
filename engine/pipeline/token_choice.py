"""Which tokens of an init image are sampled anew, by their likelihood.

    strength       the model reads the image under the caption, and the share of tokens that it finds least likely is sampled anew
    changed_from   it reads the image under the caption that it was made from, too; tokens whose likelihood falls are sampled anew:
                   those that the changed words touch (a colour: the garment, and not its ground)

Three things make likelihoods say this:

* **Looks, not tokens.** A codebook has many codes for one look (a dozen for a plain ground), and which of them stands somewhere follows
  from its neighbours. So the likelihood of a token is that of all codes that look like it, weighted by how alike they are.
* **Guidance** for both captions. Without it, the pixels read so far say more about the next ones than the caption does: below a red collar
  a red sleeve is likely, whatever the caption says.
* **Reading along.** For the same reason, a token that falls is replaced by the likeliest one at once, and what follows is read after that: a red
  sleeve below a collar that is navy by now. Each place depends on those before it; all are read in one pass, again and again until nothing
  changes (Jacobi iteration, as in engine/decoding/speculative/). That is the same as reading place by place, in fewer passes
  than there are places.

Sampling goes on as with a mask (engine/pipeline/init_image.py). Where the silhouette is held, it is by the ground that is kept around it:
benchmarks/attribute_lock.py has sheets and figures.

T text positions, N image tokens, K codes, E width of a code's vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.decoding.sampler import evaluating
from engine.models.transformer import KoDalle
from engine.pipeline.interruption import BeforePart, uninterrupted

_GUIDANCE = 3.0
_FALL = math.log(2)  # nats: half as likely is touched
# A code looks like another within this share of the distance to its eighth neighbour, which is the median one of all codes.
_ALIKE, _NEIGHBOUR, _CODES_COMPARED = 0.4, 8, 512


@dataclass(frozen=True, eq=False)
class Captions:
    """What an init image is read under: (T,) tokens each."""

    now: Tensor
    before: Tensor | None  # of the image; None: it is read under `now` alone
    empty: Tensor | None  # for guidance; None: the model has no empty caption, and reads without


def tokens_to_sample(
    model: KoDalle,
    code_vectors: Tensor,
    captions: Captions,
    image_tokens: Tensor,
    *,
    strength: float | None,
    before_pass: BeforePart = uninterrupted,
) -> Tensor:
    """Which tokens of an image are sampled anew.

    Args:
        code_vectors: (K, E), alike for codes that look alike.
        image_tokens: (N,).
        strength: share of the tokens; None, with a caption before: those that become less than half as likely.
        before_pass: called before each pass through the model, of which there are up to N + 2.

    Returns:
        (N,) bool, on the model's device.
    """
    device = model.head.weight.device
    tokens = image_tokens.to(device)
    alike = _alike(code_vectors.to(device).float(), tokens)

    def read(caption: Tensor, tokens: Tensor) -> Tensor:
        before_pass()
        return _read(model, caption, captions.empty, tokens)

    with evaluating(model):
        if captions.before is None:
            assert strength is not None
            return least_likely(_likelihoods(read(captions.now, tokens), alike), strength)
        before = _likelihoods(read(captions.before, tokens), alike)
        fall = _read_along(partial(read, captions.now), tokens, alike, before)
    return fall > _FALL if strength is None else least_likely(-fall, strength)


def least_likely(log_likelihoods: Tensor, strength: float) -> Tensor:
    """The share `strength` of tokens, the least likely; those of a lower strength are among those of a higher one.

    Args:
        log_likelihoods: (N,).
        strength: 0 to 1.

    Returns:
        (N,) bool; of equal tokens the first.
    """
    order = log_likelihoods.argsort(stable=True)
    taken = torch.zeros_like(order, dtype=torch.bool)
    taken[order[: round(strength * len(order))]] = True
    return taken


def _read_along(read: Callable[[Tensor], Tensor], tokens: Tensor, alike: Tensor, before: Tensor) -> Tensor:
    """(N,) nats by which each token's likelihood falls, read after what takes the place of those before it that fell."""
    current = tokens
    for _ in range(len(tokens) + 1):  # after n passes the first n places have settled
        log_p = read(current)
        fall = before - _likelihoods(log_p, alike)
        following = torch.where(fall > _FALL, log_p.argmax(-1), tokens)
        if torch.equal(following, current):
            break
        current = following
    return fall


def _read(model: KoDalle, caption: Tensor, empty: Tensor | None, tokens: Tensor) -> Tensor:
    """(N, K) guided log-probabilities of the codes at each place, after the tokens before it."""
    captions = caption[None] if empty is None else torch.stack([caption, empty])  # (1 or 2, T)
    _, logits = model.logits(captions.to(tokens.device), tokens.expand(len(captions), -1))
    logits = logits.float()
    guided = logits[0] if empty is None else logits[1] + _GUIDANCE * (logits[0] - logits[1])
    return guided.log_softmax(-1)


def _likelihoods(log_p: Tensor, alike: Tensor) -> Tensor:
    """(N, K), (N, K) -> (N,) log-likelihood of each token's look."""
    return (log_p.exp() * alike).sum(-1).clamp_min(torch.finfo(torch.float32).tiny).log()


def _alike(code_vectors: Tensor, tokens: Tensor) -> Tensor:
    """(N, K), 0 to 1: how much each code looks like the token of each place; 1 for the token itself."""
    compared = code_vectors[:: -(-len(code_vectors) // _CODES_COMPARED)]
    nearest = _distances(compared, code_vectors).topk(min(_NEIGHBOUR + 1, len(code_vectors)), largest=False).values
    width = (_ALIKE * nearest[:, -1].median()).clamp_min(torch.finfo(torch.float32).eps)
    return (-((_distances(code_vectors[tokens], code_vectors) / width) ** 2) / 2).exp()


def _distances(vectors: Tensor, others: Tensor) -> Tensor:
    """Exactly 0 between equal vectors."""
    return torch.cdist(vectors, others, compute_mode="donot_use_mm_for_euclid_dist")
