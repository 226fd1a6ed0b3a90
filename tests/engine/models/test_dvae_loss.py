"""The loss of dVAE training equals its formulas: a density, a divergence, a relaxation, a bound divided by an image's values."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from engine.config.codec import OpenaiDvaeConfig
from engine.config.stages import CosineScheduleConfig, DvaeRun
from engine.models.dvae_loss import dvae_losses, gumbel_noise, kl_to_uniform, logit_laplace_nll, relaxed_codes
from engine.models.openai_dvae import OpenaiDvae, map_pixels

CPU = torch.device("cpu")
TINY = OpenaiDvaeConfig(image_size=16, hidden_channels=8, decoder_channels=12, blocks_per_group=1, codebook_size=24)


@pytest.fixture
def model() -> OpenaiDvae:
    torch.manual_seed(0)
    return OpenaiDvae(TINY)


def _maps(mu: float, log_scale: float, values: int) -> torch.Tensor:
    return torch.cat([torch.full((1, 3, 1, values), mu), torch.full((1, 3, 1, values), log_scale)], dim=1)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("scale", [0.2, 0.7])
def test_logit_laplace_is_a_density(mu: float, scale: float) -> None:
    """Its integral over (0, 1) is 1, and its values are the closed form's."""
    logits = torch.linspace(-20, 20, 20_001, dtype=torch.float64)  # x = sigmoid(logit), dx = x (1 - x) dlogit
    x = torch.sigmoid(logits)
    density = torch.exp(-logit_laplace_nll(_maps(mu, math.log(scale), len(x)), x.expand(1, 3, 1, -1)))[0, 0, 0]
    assert float(torch.trapezoid(density * x * (1 - x), logits)) == pytest.approx(1, abs=1e-5)
    closed = torch.exp(-(logits - mu).abs() / scale) / (2 * scale * x * (1 - x))
    torch.testing.assert_close(density, closed, rtol=1e-4, atol=0)


def test_the_likelihood_is_greatest_at_the_image_itself(model: OpenaiDvae) -> None:
    mapped = map_pixels(torch.rand(1, 3, 4, 4))
    at_image = torch.cat([torch.logit(mapped), torch.zeros_like(mapped)], dim=1)
    best = logit_laplace_nll(at_image, mapped)
    assert bool((best < logit_laplace_nll(at_image + 0.1, mapped)).all())
    # and its first three maps are what a reconstruction shows
    torch.testing.assert_close(map_pixels(model.to_images(at_image)), mapped)


def test_a_scale_is_never_below_the_least() -> None:
    mapped = torch.full((1, 3, 1, 1), 0.5)
    exact = torch.cat([torch.logit(mapped), torch.full_like(mapped, -50.0)], dim=1)
    unbounded, bounded = (float(logit_laplace_nll(exact, mapped, least_scale=least).mean()) for least in (0.0, 0.01))
    assert unbounded == pytest.approx(-50 + math.log(2 / 4))
    assert bounded == pytest.approx(math.log(0.01) + math.log(2 / 4))
    wide = torch.cat([torch.logit(mapped), torch.zeros_like(mapped)], dim=1)
    assert float(logit_laplace_nll(wide, mapped, least_scale=0.01).mean()) == pytest.approx(math.log(1.01 / 2))


def test_divergence_from_uniform_codes() -> None:
    scores = torch.zeros(1, 8, 2, 1)
    scores[0, :, 1, 0] = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.0, 0.0, 3.0])
    probabilities = F.softmax(scores[0, :, 1, 0], dim=0)
    expected = float((probabilities * (probabilities * 8).log()).sum())
    assert kl_to_uniform(scores)[0, :, 0].tolist() == pytest.approx([0.0, expected], abs=1e-6)
    certain = torch.zeros(1, 8, 1, 1)
    certain[0, 3] = 100.0
    assert float(kl_to_uniform(certain)) == pytest.approx(math.log(8))


def test_relaxed_codes_become_codes_of_the_scores_probabilities() -> None:
    """At a low temperature one code remains, as often as the softmax of the scores says (the Gumbel-max trick)."""
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0]).view(1, 4, 1, 1).expand(1, 4, 100, 200)
    noise = gumbel_noise([7], (4, 100, 200), CPU)
    warm, cold = (relaxed_codes(scores, noise, temperature) for temperature in (1.0, 0.001))
    torch.testing.assert_close(warm.sum(dim=1), torch.ones(1, 100, 200))
    assert float((cold.amax(dim=1) > 0.99).float().mean()) > 0.99
    assert float((warm.amax(dim=1) > 0.99).float().mean()) < 0.2
    shares = F.one_hot(cold.argmax(dim=1), 4).float().mean(dim=(0, 1, 2))
    torch.testing.assert_close(shares, F.softmax(scores[0, :, 0, 0], dim=0), rtol=0, atol=0.015)  # 4.5 deviations
    torch.testing.assert_close(cold.argmax(dim=1), warm.argmax(dim=1))


def test_noise_is_gumbel_s_and_of_the_image_alone() -> None:
    noise = gumbel_noise([1, 2, 3], (64, 40, 40), CPU)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert bool(noise.isfinite().all())
    torch.testing.assert_close(gumbel_noise([3], (64, 40, 40), CPU)[0], noise[2], rtol=0, atol=0)
    assert not torch.equal(noise[0], noise[1])


def test_the_bound_is_divided_by_the_values_of_an_image(model: OpenaiDvae) -> None:
    """A position's divergence weighs beta / 192 beside a value's likelihood, at every image size."""
    images, noise = torch.rand(3, 3, 16, 16), gumbel_noise([1, 2, 3], (24, 2, 2), CPU)
    found = dvae_losses(model, images, noise, temperature=0.5, kl_weight=6.6)
    assert float(found.loss.detach()) == pytest.approx(float(found.nll) + 6.6 / 192 * float(found.kl), rel=1e-5)
    scores = model.encode_logits(images)
    maps = model.decode_mixtures(F.softmax((scores + noise) / 0.5, dim=1))
    assert float(found.nll) == pytest.approx(float(logit_laplace_nll(maps, map_pixels(images)).mean()), rel=1e-6)
    torch.testing.assert_close(found.image_tokens, model.encode(images))  # hard codes, without noise


@dataclass(frozen=True)
class CodebookUse:
    """What a short training made of the codebook, on images that it did not see."""

    kl: float  # nats that a code says of its image, at most
    in_use: int  # codes
    spread: float  # of the decoded colours, as a share of the images'


@functools.cache
def _trained(kl_weight: float, seed: int) -> CodebookUse:
    """A dVAE of images of one colour after 80 steps."""
    torch.manual_seed(seed)
    config = OpenaiDvaeConfig(
        image_size=8, hidden_channels=8, decoder_channels=16, blocks_per_group=1, codebook_size=16
    )
    model, generator = OpenaiDvae(config), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def colours(number: int) -> torch.Tensor:
        return (0.2 + 0.6 * torch.rand(number, 3, 1, 1, generator=generator)).expand(-1, -1, 8, 8)

    for step in range(80):
        noise = gumbel_noise(list(range(32 * step, 32 * step + 32)), (16, 1, 1), CPU)
        losses = dvae_losses(
            model, colours(32), noise, temperature=1 - step / 85, kl_weight=kl_weight, least_scale=0.01
        )
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    images = colours(256)
    with torch.no_grad():
        kl = float(kl_to_uniform(model.encode_logits(images)).mean())
        tokens = model.encode(images)
        decoded = model.decode(tokens)
    return CodebookUse(kl, len(tokens.unique()), float(decoded.std(0).mean() / images.std(0).mean()))


def test_more_codes_are_in_use_with_the_divergence() -> None:
    """The paper's finding: without it some codes take all images. Sums over two seeds, of 32 codes."""
    without, divided = (sum(_trained(weight, seed).in_use for seed in (1, 2)) for weight in (0.0, 6.6))
    assert divided >= 1.5 * without


@pytest.mark.parametrize("seed", [1, 2])
def test_an_undivided_divergence_empties_the_codes(seed: int) -> None:
    """Divided as in the paper, codes differ by what they show. With beta for each position as many are the likeliest
    somewhere, but they say nothing of the image, and the decoder paints one colour for all: counting them hides that."""
    divided, undivided = _trained(6.6, seed), _trained(6.6 * 192, seed)
    assert divided.kl > 0.3
    assert undivided.kl < 0.02
    assert divided.spread > 3 * undivided.spread
    assert undivided.in_use >= 3


def test_a_code_as_a_mixture_is_decoded_as_the_code(model: OpenaiDvae) -> None:
    tokens = torch.randint(24, (2, 4))
    one_hot = F.one_hot(tokens, 24).float().permute(0, 2, 1).view(2, 24, 2, 2)
    torch.testing.assert_close(model.to_images(model.decode_mixtures(one_hot)), model.decode(tokens))


def test_the_codes_convolutions_compute_in_float32() -> None:
    torch.manual_seed(0)
    model = OpenaiDvae(TINY).bfloat16()
    scores = model.encode_logits(torch.rand(1, 3, 16, 16))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert model.decode_mixtures(F.softmax(scores, dim=1)).dtype == torch.bfloat16


def test_schedules_at_their_ends() -> None:
    run = DvaeRun.model_validate(
        {"stage": "dvae", "run": "r", "data": {"pairs": "p"}, "loop": {"steps": 3_000_000}, "deepspeed": {}}
    )
    ends = {
        (run.temperature, 150_000): (1.0, 1 / 16),
        (run.kl_weight, 5_000): (0.0, 6.6),
        (CosineScheduleConfig(start=1.0, end=0.0125), 3_000_000): (1.0, 0.0125),
    }
    for (schedule, steps), (start, end) in ends.items():
        values = [
            schedule.value(step, total_steps=3_000_000) for step in (0, steps // 4, steps // 2, steps, 10 * steps)
        ]
        quarter = end + (start - end) * (1 + math.cos(math.pi / 4)) / 2
        assert values == pytest.approx([start, quarter, (start + end) / 2, end, end])
