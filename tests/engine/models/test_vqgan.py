"""The VQGAN has the published sizes and names, keeps its ranges, and rejects what does not fit."""

import pytest
import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder

from engine.config.codec import VqganConfig
from engine.models.vqgan import Vqgan, to_signed_range, to_unit_range

TINY = VqganConfig(
    image_size=32,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    latent_channels=16,
    embed_dim=12,
    codebook_size=40,
)


@pytest.fixture(scope="module")
def vqgan() -> Vqgan:
    torch.manual_seed(0)
    model = Vqgan(TINY)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize(("base_channels", "norm_groups"), [(16, 4), (8, 8), (24, 3), (32, 32)])
def test_narrow_networks_have_the_groups_of_the_config(base_channels: int, norm_groups: int) -> None:
    """taming's 32 groups would not even build at these widths; built afterwards, others have 32 again."""
    sizes = {"base_channels": base_channels, "norm_groups": norm_groups}
    model = Vqgan(VqganConfig(**(TINY.model_dump() | sizes)))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms
    assert {norm.num_groups for norm in norms} == {norm_groups}
    assert model.decode(model.encode(_images())).shape == (2, 3, 32, 32)
    published = Encoder(
        ch=32, out_ch=3, num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=32, z_channels=8
    )
    assert published.norm_out.num_groups == 32


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_groups 5 must divide base_channels 16"):
        VqganConfig(base_channels=16, norm_groups=5)


def _images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = Vqgan(VqganConfig())

    def count(*parts: torch.nn.Module) -> int:
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    assert count(model.encoder) == 29_298_176
    assert count(model.decoder) == 42_449_795
    assert count(model.quantize) == 4_194_304
    assert count(model.quant_conv, model.post_quant_conv) == 131_584
    assert count(model) == 76_073_859
    assert len(model.state_dict()) == 343


def test_state_dict_names_are_taming_s() -> None:
    with torch.device("meta"):
        names = set(Vqgan(VqganConfig()).state_dict())
    assert {name.split(".")[0] for name in names} == {
        "encoder",
        "decoder",
        "quantize",
        "quant_conv",
        "post_quant_conv",
    }
    for name in (
        "encoder.down.4.attn.1.proj_out.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.up.4.attn.2.norm.bias",
        "decoder.conv_out.weight",
        "quantize.embedding.weight",
        "quant_conv.bias",
    ):
        assert name in names


def test_equals_taming_s_blocks_put_together(vqgan: Vqgan) -> None:
    knobs = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1, 1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (8,),
        "in_channels": 3,
        "resolution": 32,
        "z_channels": 16,
    }
    encoder, decoder = Encoder(double_z=False, **knobs), Decoder(**knobs)
    encoder.load_state_dict(vqgan.encoder.state_dict())
    decoder.load_state_dict(vqgan.decoder.state_dict())
    images = _images()
    with torch.no_grad():
        z = vqgan.quant_conv(encoder(2 * images - 1)).permute(0, 2, 3, 1)  # (B, h, w, E)
        tokens = (z[..., None, :] - vqgan.quantize.embedding.weight).square().sum(-1).argmin(-1)
        entries = vqgan.quantize.embedding.weight[tokens].permute(0, 3, 1, 2)
        expected = decoder(vqgan.post_quant_conv(entries))
        reconstruction, _, image_tokens = vqgan(images)
    assert torch.equal(image_tokens, tokens.flatten(1))
    torch.testing.assert_close(reconstruction, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vqgan.decode(image_tokens), (expected.clamp(-1, 1) + 1) / 2, rtol=1e-4, atol=1e-5)


def test_encode_and_decode_agree_with_forward(vqgan: Vqgan) -> None:
    images = _images(3)
    with torch.no_grad():
        reconstruction, loss, image_tokens = vqgan(images)
    assert image_tokens.shape == (3, TINY.image_seq_len)
    assert image_tokens.dtype == torch.int64
    assert loss.shape == ()
    assert torch.equal(vqgan.encode(images), image_tokens)
    decoded = vqgan.decode(image_tokens)
    assert decoded.shape == (3, 3, 32, 32)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    torch.testing.assert_close(decoded, to_unit_range(reconstruction), rtol=1e-4, atol=1e-5)


def test_one_image_equals_a_batch(vqgan: Vqgan) -> None:
    images = _images(3)
    tokens = vqgan.encode(images)
    assert torch.equal(torch.cat([vqgan.encode(image[None]) for image in images]), tokens)
    alone = torch.cat([vqgan.decode(row[None]) for row in tokens])
    torch.testing.assert_close(alone, vqgan.decode(tokens), rtol=1e-4, atol=1e-5)


def test_channels_last_changes_nothing(vqgan: Vqgan) -> None:
    last = Vqgan(TINY).eval()
    last.load_state_dict(vqgan.state_dict())
    for weight in last.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    images = _images()
    tokens = vqgan.encode(images)
    assert torch.equal(last.encode(images.contiguous(memory_format=torch.channels_last)), tokens)
    torch.testing.assert_close(last.decode(tokens), vqgan.decode(tokens), rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(vqgan: Vqgan) -> None:
    model = Vqgan(TINY)
    reconstruction, loss, _ = model(_images())
    (reconstruction.square().mean() + loss).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.last_layer_weight is model.decoder.conv_out.weight


def test_building_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Vqgan(TINY)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [-1, 40, 10**9])
def test_decode_refuses_tokens_outside_the_codebook(vqgan: Vqgan, bad: int) -> None:
    tokens = torch.zeros(1, TINY.image_seq_len, dtype=torch.int64)
    tokens[0, 5] = bad
    with pytest.raises(ValueError, match=r"the codebook has 0\.\.39"):
        vqgan.decode(tokens)


def test_wrong_shapes_and_types_are_refused(vqgan: Vqgan) -> None:
    with pytest.raises(ValueError, match=r"\(B, 64\)"):
        vqgan.decode(torch.zeros(1, 63, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        vqgan.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="float in"):
        vqgan.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_an_empty_batch_is_no_error(vqgan: Vqgan) -> None:
    assert vqgan.decode(torch.zeros(0, TINY.image_seq_len, dtype=torch.int64)).shape == (0, 3, 32, 32)


def test_ranges_invert_each_other() -> None:
    images = _images()
    torch.testing.assert_close(to_unit_range(to_signed_range(images)), images)
    assert to_unit_range(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]
