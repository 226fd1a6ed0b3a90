"""Loss of dVAE training: the Gumbel-softmax relaxation and the evidence lower bound with a logit-Laplace likelihood.

    y    = softmax((scores + g) / temperature), g ~ Gumbel(0, 1)      the decoder reads y, in forward and backward pass
    L    = (-ln p(x | y) + beta * KL) / (3 * S * S)
    KL   = sum over positions of KL(softmax(scores) | uniform over K)  without noise and temperature
    p    = logit-Laplace: exp(-|logit x - mu| / b) / (2 b x (1 - x)), mu and ln b from the decoder's six maps

The bound is divided by the values of an image, so a position's divergence has the weight beta / 192 beside a value's
likelihood: at an eighth of the image's size there are 192 values a position. Undivided, at beta = 6.6, the encoder scores all
codes alike and the decoder paints the mean image (tests/engine/models/test_dvae_loss.py).

Shapes: B images, S pixels, K codes, h = w = S / 8.
Source: Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A; Jang et al. 2017, arXiv:1611.01144.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.image_tokens import likeliest_codes
from engine.models.openai_dvae import OpenaiDvae, map_pixels


class DvaeLosses(NamedTuple):
    """One training pass; scalars are float32."""

    loss: Tensor  # what is minimised
    nll: Tensor  # nats a value, at the relaxed codes
    kl: Tensor  # nats a position: 0, nothing of the image, to ln K
    image_tokens: Tensor  # (B, N) int64: the codes without noise


def dvae_losses(
    model: OpenaiDvae,
    images: Tensor,
    noise: Tensor,
    *,
    temperature: float,
    kl_weight: float,
    least_scale: float = 0.0,
) -> DvaeLosses:
    """The loss of a batch and its parts.

    Args:
        images: (B, 3, S, S) float in [0, 1].
        noise: (B, K, h, w), of `gumbel_noise`.
        temperature: above 0; towards 0 a relaxed code becomes a code.
        kl_weight: beta.
        least_scale: as in `logit_laplace_nll`.

    Raises:
        ValueError: images of wrong shape or type.
    """
    scores = model.encode_logits(images)
    maps = model.decode_mixtures(relaxed_codes(scores, noise, temperature))
    nll = logit_laplace_nll(maps, map_pixels(images.float()), least_scale=least_scale).mean()
    kl = kl_to_uniform(scores)  # (B, h, w)
    divided = kl.sum(dim=(1, 2)).mean() / images[0].numel()
    return DvaeLosses(nll + kl_weight * divided, nll.detach(), kl.detach().mean(), likeliest_codes(scores.detach()))


def gumbel_noise(seeds: list[int], scores_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Standard Gumbel noise, of one seed an image: (B, K, h, w) float32. An image's noise does not depend on its batch."""
    noise = torch.empty(len(seeds), *scores_shape, dtype=torch.float32, device=device)
    for row, seed in zip(noise, seeds, strict=True):
        row.exponential_(generator=torch.Generator(device).manual_seed(seed))
    return noise.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()


def relaxed_codes(scores: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Mixtures of codes: scores and noise (B, K, h, w) -> the same, float32, each position's sum 1."""
    return F.softmax((scores.float() + noise) / temperature, dim=1)


def kl_to_uniform(scores: Tensor) -> Tensor:
    """ln K less the entropy of a position's codes, in nats: (B, K, h, w) -> (B, h, w) float32."""
    log_probabilities = F.log_softmax(scores.float(), dim=1)
    return (log_probabilities.exp() * log_probabilities).sum(dim=1) + math.log(scores.shape[1])


def logit_laplace_nll(maps: Tensor, mapped: Tensor, *, least_scale: float = 0.0) -> Tensor:
    """-ln p of each value, in nats.

    Args:
        maps: (B, 6, S, S): three of mu, three of ln b.
        mapped: (B, 3, S, S) in (0, 1).
        least_scale: is added to b. On ground of one colour, as around cut-outs, the likelihood has no bound otherwise.

    Returns:
        (B, 3, S, S) float32.
    """
    mu, log_scale = maps.float().chunk(2, dim=1)
    if least_scale > 0:
        log_scale = torch.logaddexp(log_scale, torch.full_like(log_scale, math.log(least_scale)))
    distance = (torch.logit(mapped) - mu).abs()
    return distance * torch.exp(-log_scale) + log_scale + math.log(2) + torch.log(mapped * (1 - mapped))
