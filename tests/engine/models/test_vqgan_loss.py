"""The VQGAN loss equals taming's formulas, and the discriminator costs nothing before it starts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.stages import VqganLossConfig
from engine.models.lpips import Lpips
from engine.models.vqgan_loss import build_discriminator, discriminator_active, discriminator_loss, generator_loss


class LastLayer(nn.Module):
    """Stands for a decoder: one convolution whose weight balances the two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv_out(hidden)


def _config(**changes: object) -> VqganLossConfig:
    return VqganLossConfig(**({"perceptual": "none", "disc_start": 5, "disc_channels": 8, "disc_layers": 2} | changes))


@pytest.fixture
def parts() -> tuple[nn.Module, LastLayer, Tensor, Tensor]:
    torch.manual_seed(0)
    return build_discriminator(_config()), LastLayer(), torch.randn(2, 4, 32, 32), torch.rand(2, 3, 32, 32)


def test_published_discriminator_size() -> None:
    with torch.device("meta"):
        discriminator = build_discriminator(VqganLossConfig())
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    assert any(isinstance(module, nn.BatchNorm2d) for module in discriminator.modules())


def test_start_and_weight_decide_whether_it_takes_part() -> None:
    assert [discriminator_active(step, _config()) for step in (4, 5)] == [False, True]
    assert not discriminator_active(9, _config(disc_weight=0))


class Untouchable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("the discriminator must not run before disc_start")


@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_before_the_start(parts: tuple[nn.Module, LastLayer, Tensor, Tensor], pixel: str) -> None:
    _, decoder, hidden, images = parts
    reconstruction, quantiser_loss = decoder(hidden), torch.tensor(0.7)
    config = _config(pixel=pixel, codebook_weight=2.0)
    loss, scalars = generator_loss(
        Untouchable(),
        reconstruction,
        images,
        quantiser_loss,
        decoder.conv_out.weight,
        step=4,
        config=config,
        perceptual=None,
    )
    difference = reconstruction - (2 * images - 1)
    expected = difference.abs().mean() if pixel == "l1" else difference.square().mean()
    torch.testing.assert_close(loss, expected + 2.0 * 0.7)
    assert set(scalars) == {"loss", "pixel", "quantiser"}
    assert not any(value.requires_grad for value in scalars.values())


def test_after_the_start_equals_taming_s_formula(parts: tuple[nn.Module, LastLayer, Tensor, Tensor]) -> None:
    discriminator, decoder, hidden, images = parts
    torch.manual_seed(1)
    perceptual = Lpips()
    weight = decoder.conv_out.weight
    config = _config(perceptual="lpips", perceptual_weight=0.5, disc_weight=0.8)
    target = 2 * images - 1

    reconstruction = decoder(hidden)
    nll = torch.mean((target - reconstruction).abs() + 0.5 * perceptual(target, reconstruction).view(-1, 1, 1, 1))
    g_loss = -discriminator(reconstruction).mean()
    nll_gradient = torch.autograd.grad(nll, weight, retain_graph=True)[0]
    g_gradient = torch.autograd.grad(g_loss, weight, retain_graph=True)[0]
    d_weight = (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0, 1e4) * 0.8
    expected = nll + d_weight * g_loss + 0.3
    expected_gradient = nll_gradient + d_weight * g_gradient

    discriminator.requires_grad_(False)
    loss, scalars = generator_loss(
        discriminator,
        decoder(hidden),
        images,
        torch.tensor(0.3),
        weight,
        step=5,
        config=config,
        perceptual=perceptual,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scalars["adaptive_weight"] * 0.8, d_weight)
    loss.backward()
    torch.testing.assert_close(weight.grad, expected_gradient)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_features_of_the_discriminator_are_part_of_the_balance(
    parts: tuple[nn.Module, LastLayer, Tensor, Tensor],
) -> None:
    """Against forward hooks on the discriminator's activations; equal images have no distance."""
    discriminator, decoder, hidden, images = parts
    discriminator.requires_grad_(False)
    weight, target = decoder.conv_out.weight, 2 * images - 1
    seen: list[Tensor] = []
    activations = [module for module in discriminator.modules() if isinstance(module, nn.LeakyReLU)]
    # inplace activations: a hook's output is the tensor itself, and nothing writes into it again
    hooks = [module.register_forward_hook(lambda _m, _i, output: seen.append(output)) for module in activations]
    reconstruction = decoder(hidden)
    g_loss = -discriminator(reconstruction).mean()
    discriminator(target)
    for hook in hooks:
        hook.remove()
    mine, real = seen[: len(activations)], seen[len(activations) :]
    assert len(mine) == len(real) == 3  # one after the first convolution, one for each of two layers
    features = torch.stack([(a - b).abs().mean() for a, b in zip(mine, real, strict=True)]).sum() / 3
    nll = (reconstruction - target).abs().mean() + 2.0 * features
    nll_gradient = torch.autograd.grad(nll, weight, retain_graph=True)[0]
    g_gradient = torch.autograd.grad(g_loss, weight, retain_graph=True)[0]
    d_weight = (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0, 1e4) * 0.8

    config = _config(disc_weight=0.8, feature_weight=2.0)
    loss, scalars = generator_loss(
        discriminator, decoder(hidden), images, torch.tensor(0.3), weight, step=5, config=config, perceptual=None
    )
    torch.testing.assert_close(scalars["features"], features.detach())
    torch.testing.assert_close(loss, nll + d_weight * g_loss + 0.3)
    loss.backward()
    torch.testing.assert_close(weight.grad, nll_gradient + d_weight * g_gradient)

    _, same = generator_loss(
        discriminator, target, images, torch.tensor(0.0), weight, step=5, config=config, perceptual=None
    )
    assert same["features"].item() == 0
    _, before = generator_loss(None, target, images, torch.tensor(0.0), weight, step=4, config=config, perceptual=None)
    assert "features" not in before


def test_adaptive_weight_is_bounded(parts: tuple[nn.Module, LastLayer, Tensor, Tensor]) -> None:
    _, decoder, hidden, images = parts

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.0))

        def forward(self, images: Tensor) -> Tensor:
            return images * self.factor

    _, scalars = generator_loss(
        Blind(),
        decoder(hidden * 1e6),
        images,
        torch.tensor(0.0),
        decoder.conv_out.weight,
        step=5,
        config=_config(pixel="l2"),
        perceptual=None,
    )
    assert scalars["adaptive_weight"].item() == 1e4


def test_validation_without_gradients(parts: tuple[nn.Module, LastLayer, Tensor, Tensor]) -> None:
    discriminator, decoder, hidden, images = parts
    with torch.no_grad():
        loss, scalars = generator_loss(
            discriminator,
            decoder(hidden),
            images,
            torch.tensor(0.0),
            decoder.conv_out.weight,
            step=9,
            config=_config(),
            perceptual=None,
        )
    assert scalars["adaptive_weight"].item() == 0
    torch.testing.assert_close(loss, scalars["pixel"])


def test_discriminator_loss_is_the_hinge(parts: tuple[nn.Module, LastLayer, Tensor, Tensor]) -> None:
    discriminator, decoder, hidden, images = parts
    reconstruction = decoder(hidden)
    real, fake = discriminator(2 * images - 1), discriminator(reconstruction.detach())
    expected = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    loss, scalars = discriminator_loss(discriminator, reconstruction, images)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scalars["logits_real"], real.mean().detach())
    loss.backward()
    assert decoder.conv_out.weight.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_missing_parts_are_named(parts: tuple[nn.Module, LastLayer, Tensor, Tensor]) -> None:
    _, decoder, hidden, images = parts
    arguments = (decoder(hidden), images, torch.tensor(0.0), decoder.conv_out.weight)
    with pytest.raises(ValueError, match="discriminator"):
        generator_loss(None, *arguments, step=5, config=_config(), perceptual=None)
    with pytest.raises(ValueError, match="lpips"):
        generator_loss(None, *arguments, step=0, config=_config(perceptual="lpips"), perceptual=None)
