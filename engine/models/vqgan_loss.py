"""Losses of VQGAN training: pixels, perceptual distance, codebook, and a patch discriminator.

Computes taming's `VQLPIPSWithDiscriminator` as two pure functions, because generator and discriminator are two
DeepSpeed engines with an optimiser each. One difference: before `disc_start` taming runs the discriminator and
multiplies by zero; here it does not run.

    generator:      L = |x - x'| + w_p P(x, x') + w_f F(x, x') + w_c L_quantiser + lambda * w_d * (-mean D(x'))
                    lambda = clamp(|grad nll| / (|grad g| + 1e-4), 0, 1e4), gradients at the decoder's last convolution
                    F = mean over D's hidden layers of mean |D_l(x) - D_l(x')|
    discriminator:  L = (mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2

P is LPIPS as published, or another distance of engine.models.perceptual. `feature_weight` (0 as published) is for trainings without LPIPS weights: the hidden layers of the discriminator learn
from the images what makes one look real. nll is everything before lambda.

Shapes: B images, S pixels. `images` are [0, 1] as everywhere; `reconstruction` is [-1, 1] as `Vqgan.forward` returns
it.
Source: Esser et al. 2021, arXiv:2012.09841, equations 4-7; taming `modules/losses/vqperceptual.py`; F: Larsen et al.
2016, arXiv:1512.09300; Wang et al. 2018, arXiv:1711.11585, equation 4.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn

from engine.config.stages import VqganLossConfig
from engine.models.perceptual import PerceptualDistance, shifted_windows
from engine.models.vqgan import to_signed_range

_MAX_ADAPTIVE_WEIGHT = 1e4


class Discriminator(Protocol):
    """A PatchGAN or the DeepSpeed engine around one: (B, 3, S, S) in [-1, 1] -> (B, 1, s, s) logits, one a patch."""

    def __call__(self, images: Tensor, /) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def build_discriminator(config: VqganLossConfig) -> NLayerDiscriminator:
    """taming's PatchGAN with BatchNorm: 2,765,633 parameters at 64 channels and 3 layers.

    (B, 3, S, S) in [-1, 1] -> (B, 1, s, s) logits, one a patch. Its running statistics belong into checkpoints.
    """
    discriminator = NLayerDiscriminator(input_nc=3, ndf=config.disc_channels, n_layers=config.disc_layers)
    return discriminator.float().apply(weights_init)  # taming builds in the default dtype


def discriminator_active(step: int, config: VqganLossConfig) -> bool:
    """Whether the discriminator takes part in the loss, and is trained, at this step (counted from 0)."""
    return config.disc_weight > 0 and step >= config.disc_start


def generator_loss(
    discriminator: nn.Module | None,
    reconstruction: Tensor,
    images: Tensor,
    quantiser_loss: Tensor,
    last_layer_weight: Tensor,
    *,
    step: int,
    config: VqganLossConfig,
    perceptual: PerceptualDistance | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of encoder, codebook and decoder.

    The caller sets `discriminator.requires_grad_(False)` around this step, so that no gradient is computed for it.

    Args:
        discriminator: not run, and may be None, where `discriminator_active` is false.
        reconstruction: (B, 3, S, S), [-1, 1], with a graph unless gradients are off (validation).
        images: (B, 3, S, S), [0, 1].
        quantiser_loss: scalar.
        last_layer_weight: `Vqgan.last_layer_weight`; must be whole (not partitioned as by ZeRO stage 3).
        step: training step from 0.
        config: weights.
        perceptual: the distance of `config.perceptual`; None for `none`.

    Returns:
        scalar loss, and detached 0-d float32 tensors: loss, pixel, quantiser, perceptual (where there is one), and while
        the discriminator takes part features (when weighted), generator and adaptive_weight (0 where gradients are off,
        as in taming).

    Raises:
        ValueError: a part is missing that the config requires.
    """
    target = to_signed_range(images.float())
    reconstruction = reconstruction.float()
    pixel = _pixel_loss(reconstruction, target, config.pixel)
    scalars = {"pixel": pixel.detach(), "quantiser": quantiser_loss.detach().float()}
    nll = pixel
    if (perceptual is None) != (config.perceptual == "none"):
        raise ValueError(f"config.perceptual is {config.perceptual}, the distance given is {perceptual}")
    if perceptual is not None:
        windows = shifted_windows(reconstruction, target, largest=config.perceptual_shift, seed=step)
        distance = perceptual(*windows).mean()
        scalars["perceptual"] = distance.detach()
        nll = nll + config.perceptual_weight * distance
    if not discriminator_active(step, config):
        loss = nll + config.codebook_weight * quantiser_loss
        return loss, {"loss": loss.detach(), **scalars}

    if discriminator is None:
        raise ValueError(f"step {step} >= disc_start {config.disc_start} needs a discriminator")
    if config.feature_weight > 0:
        *hidden, logits = _activations(discriminator, reconstruction)
        with torch.no_grad():
            target_hidden = _activations(discriminator, target)[:-1]
        features = torch.stack(
            [F.l1_loss(generated, real) for generated, real in zip(hidden, target_hidden, strict=True)]
        ).mean()
        scalars["features"] = features.detach()
        nll = nll + config.feature_weight * features
    else:
        logits = _patch_logits(discriminator, reconstruction)
    generator = -logits.mean()
    weight = _adaptive_weight(nll, generator, last_layer_weight)
    loss = nll + config.codebook_weight * quantiser_loss + config.disc_weight * weight * generator
    return loss, {"loss": loss.detach(), **scalars, "generator": generator.detach(), "adaptive_weight": weight}


def discriminator_loss(
    discriminator: Discriminator, reconstruction: Tensor, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss of the discriminator; only where `discriminator_active` is true.

    Args:
        reconstruction: (B, 3, S, S), [-1, 1]; its graph is not followed.
        images: (B, 3, S, S), [0, 1].

    Returns:
        scalar loss, and detached 0-d tensors: discriminator, logits_real, logits_fake (means).
    """
    # Two passes, not one over the joined batch: BatchNorm computes statistics of real and fake separately, as
    # published.
    real = _patch_logits(discriminator, to_signed_range(images.float()).detach())
    fake = _patch_logits(discriminator, reconstruction.detach().float())
    loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    scalars = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
    return loss, {name: value.detach() for name, value in scalars.items()}


def _pixel_loss(reconstruction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Pixel distance; `l1+l2` weights large, wrongly coloured areas more, which L1 alone corrects late."""
    l1 = F.l1_loss(reconstruction, target) if "l1" in kind else 0.0
    l2 = F.mse_loss(reconstruction, target) if "l2" in kind else 0.0
    return l1 + l2  # type: ignore[return-value]


def _patch_logits(discriminator: Discriminator, images: Tensor) -> Tensor:
    """Patch logits in float32; images are cast to the discriminator's type, which may be bfloat16."""
    dtype = next(discriminator.parameters()).dtype
    logits: Tensor = discriminator(images.to(dtype))
    return logits.float()


def _activations(discriminator: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs of each activation of a PatchGAN, shallow to deep, and last the patch logits; float32."""
    hidden = images.to(next(discriminator.parameters()).dtype)
    found = []
    for layer in discriminator.main:  # type: ignore[union-attr]
        hidden = layer(hidden)
        if isinstance(layer, nn.LeakyReLU):
            found.append(hidden.float())
    return [*found, hidden.float()]


def _adaptive_weight(nll: Tensor, generator: Tensor, last_layer_weight: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and nll.requires_grad and last_layer_weight.requires_grad):
        return torch.zeros((), dtype=torch.float32, device=nll.device)
    nll_gradient, generator_gradient = (
        torch.autograd.grad(value, last_layer_weight, retain_graph=True)[0].float() for value in (nll, generator)
    )
    ratio = nll_gradient.norm() / (generator_gradient.norm() + 1e-4)
    return ratio.clamp(0.0, _MAX_ADAPTIVE_WEIGHT).detach()
