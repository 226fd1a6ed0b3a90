"""Reconstruction errors against a plain computation of them."""

import math

import pytest
import torch

from engine.config.codec import VqganConfig
from engine.metrics.reconstruction import reconstruction_error
from engine.models.vqgan import Vqgan

CONFIG = VqganConfig(
    image_size=32, base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    latent_channels=16, embed_dim=8, codebook_size=32, norm_groups=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def vqgan() -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(CONFIG).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_equals_a_plain_computation(vqgan: Vqgan, images: torch.Tensor) -> None:
    tokens = vqgan.encode(images)
    error = (vqgan.decode(tokens) - images).double()
    shares = tokens.flatten().bincount(minlength=32) / tokens.numel()
    found = reconstruction_error(vqgan, [images])
    assert found == {
        "images": 7,
        "mae": pytest.approx(float(error.abs().mean())),
        "mse": pytest.approx(float(error.square().mean())),
        "psnr_db": pytest.approx(-10 * math.log10(float(error.square().mean()))),
        "codebook_used": pytest.approx(float((shares > 0).float().mean())),
        "codebook_perplexity": pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist() if p)), rel=1e-5),
    }


def test_batches_of_any_size_give_the_same(vqgan: Vqgan, images: torch.Tensor) -> None:
    whole = reconstruction_error(vqgan, [images])
    assert reconstruction_error(vqgan, images.split(3)) == pytest.approx(whole, rel=1e-5)


def test_a_perfect_codec_has_a_finite_psnr(vqgan: Vqgan, images: torch.Tensor) -> None:
    fixed_point = vqgan.decode(vqgan.encode(images))
    vqgan_encode = vqgan.encode(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqgan, "encode", lambda _: vqgan_encode)
        found = reconstruction_error(vqgan, [fixed_point])
    assert found["mae"] == 0
    assert found["psnr_db"] == 70


def test_no_images(vqgan: Vqgan) -> None:
    with pytest.raises(ValueError, match="no images"):
        reconstruction_error(vqgan, [])
