"""Codecs of other projects: found by content, the originals' codes and images, faults by name."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from engine.codec.vqgan_decoder import FastDecoder
from engine.config.codec import DiscreteVaeConfig, OpenaiDvaeConfig, VqganConfig
from engine.errors import InputError
from engine.interop.importing import ImportOptions, Kind, import_checkpoint
from engine.models.discrete_vae import DiscreteVae
from engine.models.folder import load_part
from engine.models.gumbel_vqgan import GumbelVqgan
from engine.models.image_codec import ImageCodec, build_codec
from engine.models.openai_dvae import OpenaiDvae
from engine.models.vqgan import Vqgan
from tests.engine.interop.layouts import save_lightning, save_module

VQGAN = VqganConfig(
    image_size=32, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(16,),
    latent_channels=16, embed_dim=16, codebook_size=40,
)  # fmt: skip
GUMBEL = VQGAN.model_copy(update={"family": "gumbel-vqgan"})
DISCRETE = DiscreteVaeConfig(
    image_size=32, num_layers=2, hidden_channels=12, num_res_blocks=1, embed_dim=10, codebook_size=30
)
OPENAI = OpenaiDvaeConfig(image_size=32, hidden_channels=8, decoder_channels=12, blocks_per_group=1, codebook_size=24)


def _codec(config: Any) -> Any:
    """A codec with weights that use all of its codes."""
    torch.manual_seed(3)
    codec: Any = build_codec(config).eval()
    for parameter in codec.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, std=0.3)
    if getattr(config, "image_channels", 3) == 4:
        with torch.no_grad():
            codec.decoder[-1].bias[3] = 0.5  # alpha, in [0, 1]
    if isinstance(codec, Vqgan):
        nn.init.normal_(codec.quantize.embedding.weight)
    return codec


def _images(config: Any, count: int = 2) -> Tensor:
    channels = getattr(config, "image_channels", 3)
    size = config.image_size
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def _taming(folder: Path, config: VqganConfig) -> Path:
    """The checkpoint and, beside it, the yaml that taming's training writes."""
    folder.mkdir()
    save_lightning(_codec(config).state_dict(), folder / "last.ckpt")
    ddconfig = {
        "double_z": False, "z_channels": config.latent_channels, "resolution": config.image_size, "in_channels": 3,
        "out_ch": 3, "ch": config.base_channels, "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks, "attn_resolutions": list(config.attention_resolutions), "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": config.embed_dim, "n_embed": config.codebook_size, "ckpt_path": "None", "ddconfig": ddconfig}
    content = {"model": {"base_learning_rate": 4.5e-06, "target": "taming.models.vqgan.VQModel", "params": params}}
    (folder / "project.yaml").write_text(yaml.safe_dump(content))
    return folder / "last.ckpt"


def _discrete_vae(folder: Path, config: DiscreteVaeConfig, **hparams: Any) -> Path:
    folder.mkdir()
    stated = {
        "image_size": config.image_size, "num_layers": config.num_layers, "num_tokens": config.codebook_size,
        "codebook_dim": config.embed_dim, "hidden_dim": config.hidden_channels,
        "num_resnet_blocks": config.num_res_blocks,
    }  # fmt: skip
    torch.save({"hparams": stated | hparams, "weights": _codec(config).state_dict()}, folder / "vae.pt")
    return folder / "vae.pt"


def _openai(folder: Path, config: OpenaiDvaeConfig, *, zipped: bool = True) -> Path:
    folder.mkdir()
    tensors = _codec(config).state_dict()
    for side in ("encoder", "decoder"):
        own = {name.removeprefix(f"{side}."): value for name, value in tensors.items() if name.startswith(side)}
        save_module(own, folder / f"{side}.pkl", f"dall_e.{side}", side.title(), zipped=zipped)
    return folder


def _source(folder: Path, config: Any) -> Path:
    if isinstance(config, VqganConfig):
        return _taming(folder, config)
    if isinstance(config, DiscreteVaeConfig):
        return _discrete_vae(folder, config)
    return _openai(folder, config)


CONFIGS: dict[str, tuple[Any, Kind]] = {
    "vqgan": (VQGAN, "vqgan"),
    "gumbel-vqgan": (GUMBEL, "vqgan"),
    "discrete-vae": (DISCRETE, "discrete-vae"),
    "discrete-vae, four channels": (
        DISCRETE.model_copy(update={"image_channels": 4, "num_res_blocks": 0}),
        "discrete-vae",
    ),
    "openai-dvae": (OPENAI, "openai-dvae"),
}


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


@pytest.mark.parametrize("name", CONFIGS)
def test_imported_codecs_are_the_same(name: str, tmp_path: Path) -> None:
    config, kind = CONFIGS[name]
    source = _source(tmp_path / "source", config)
    found = import_checkpoint(source, tmp_path / "model", options=ImportOptions(image_size=32))
    assert (found.kind, found.parts["vqgan"].config) == (kind, config)
    original, imported = _codec(config), load_part(tmp_path / "model", "vqgan")
    assert type(imported) is type(original)
    tokens = original.encode(_images(config))
    assert len(tokens.unique()) > 1
    assert torch.equal(imported.encode(_images(config)), tokens)
    assert torch.equal(imported.decode(tokens), original.decode(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_decoder_decodes_every_family(name: str) -> None:
    codec: ImageCodec = _codec(CONFIGS[name][0])
    tokens = codec.encode(_images(codec.config))
    expected = codec.decode(tokens)
    decoder = FastDecoder(codec)
    assert expected.std() > 0.01
    assert (decoder.decode(tokens) - expected).abs().max() <= 1e-4
    assert torch.equal(decoder.decode(tokens[1:]), decoder.decode(tokens)[1:])


# ------------------------------------------------------------------------- the originals' arithmetic, written a second time


def test_gumbel_codes_are_the_scores_maximum_without_noise() -> None:
    codec: GumbelVqgan = _codec(GUMBEL)
    images = _images(GUMBEL)
    latents = codec.quant_conv(codec.encoder(2 * images - 1))
    weight = codec.quantize.proj.weight[:, :, 0, 0]
    scores = torch.einsum("kz,bzhw->bhwk", weight, latents) + _bias(codec.quantize.proj)
    tokens = codec.encode(images)
    assert torch.equal(tokens, scores.argmax(-1).flatten(1))
    assert torch.equal(tokens, codec.encode(images))  # the original draws noise and differs in nine codes of ten
    entries = codec.quantize.embed.weight[tokens].view(2, 16, 16, -1).permute(0, 3, 1, 2)
    decoded = (codec.decoder(codec.post_quant_conv(entries)).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(codec.decode(tokens), decoded, atol=1e-6, rtol=0)


def _conv(tensors: dict[str, Tensor], name: str, stream: Tensor, **options: Any) -> Tensor:
    return F.conv2d(stream, tensors[f"{name}.weight"], tensors[f"{name}.bias"], **options)


def _residual(tensors: dict[str, Tensor], name: str, stream: Tensor) -> Tensor:
    inner = F.relu(_conv(tensors, f"{name}.net.0", stream, padding=1))
    inner = F.relu(_conv(tensors, f"{name}.net.2", inner, padding=1))
    return _conv(tensors, f"{name}.net.4", inner) + stream


@torch.no_grad()
def test_discrete_vae_computes_what_dalle_pytorch_does() -> None:
    codec: DiscreteVae = _codec(DISCRETE)
    tensors, images = codec.state_dict(), _images(DISCRETE)
    stream = (images - 0.5) / 0.5
    for layer in range(2):
        stream = F.relu(_conv(tensors, f"encoder.{layer}.0", stream, stride=2, padding=1))
    logits = _conv(tensors, "encoder.3", _residual(tensors, "encoder.2", stream))
    tokens = logits.argmax(1).flatten(1)
    torch.testing.assert_close(codec.encode_logits(images), logits)
    assert torch.equal(codec.encode(images), tokens)
    stream = tensors["codebook.weight"][tokens].view(2, 8, 8, -1).permute(0, 3, 1, 2)
    stream = _residual(tensors, "decoder.1", _conv(tensors, "decoder.0", stream))
    for layer in (2, 3):
        weight, bias = tensors[f"decoder.{layer}.0.weight"], tensors[f"decoder.{layer}.0.bias"]
        stream = F.relu(F.conv_transpose2d(stream, weight, bias, stride=2, padding=1))
    images = (_conv(tensors, "decoder.4", stream) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.decode(tokens), images, atol=1e-6, rtol=0)


def _openai_conv(tensors: dict[str, Tensor], name: str, stream: Tensor) -> Tensor:
    weight = tensors[f"{name}.w"]
    return F.conv2d(stream, weight, tensors[f"{name}.b"], padding=weight.shape[-1] // 2)


def _openai_block(tensors: dict[str, Tensor], name: str, stream: Tensor) -> Tensor:
    inner = stream
    for number in range(1, 5):
        inner = _openai_conv(tensors, f"{name}.res_path.conv_{number}", F.relu(inner))
    identity = _openai_conv(tensors, f"{name}.id_path", stream) if f"{name}.id_path.w" in tensors else stream
    return identity + inner / 4**2  # four groups of one block


@torch.no_grad()
def test_openai_dvae_computes_what_dall_e_does() -> None:
    codec: OpenaiDvae = _codec(OPENAI)
    tensors, images = codec.state_dict(), _images(OPENAI)
    stream = _openai_conv(tensors, "encoder.blocks.input", 0.8 * images + 0.1)
    for group in range(1, 5):
        stream = _openai_block(tensors, f"encoder.blocks.group_{group}.block_1", stream)
        stream = F.max_pool2d(stream, 2) if group < 4 else stream
    logits = _openai_conv(tensors, "encoder.blocks.output.conv", F.relu(stream))
    torch.testing.assert_close(codec.encode_logits(images), logits)
    tokens = codec.encode(images)
    assert torch.equal(tokens, logits.argmax(1).flatten(1))
    one_hot = F.one_hot(tokens, 24).float().view(2, 4, 4, 24).permute(0, 3, 1, 2)
    stream = _openai_conv(tensors, "decoder.blocks.input", one_hot)
    for group in range(1, 5):
        stream = _openai_block(tensors, f"decoder.blocks.group_{group}.block_1", stream)
        stream = stream.repeat_interleave(2, -1).repeat_interleave(2, -2) if group < 4 else stream
    maps = _openai_conv(tensors, "decoder.blocks.output.conv", F.relu(stream))
    expected = ((torch.sigmoid(maps[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(codec.decode(tokens), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_alpha_is_opaque_where_there_is_none_and_laid_over_white() -> None:
    config = DISCRETE.model_copy(update={"image_channels": 4})
    codec: DiscreteVae = _codec(config)
    images = _images(DISCRETE)
    tokens = codec.encode(images)
    assert torch.equal(tokens, codec.encode(torch.cat([images, torch.ones(2, 1, 32, 32)], dim=1)))
    channels = codec.decode_channels(tokens)
    assert channels.shape == (2, 4, 32, 32)
    assert 0 < channels[:, 3].mean() < 1
    colours = [channels[:, number] * channels[:, 3] + 1 - channels[:, 3] for number in range(3)]
    torch.testing.assert_close(codec.decode(tokens), torch.stack(colours, dim=1))


def test_published_sizes() -> None:
    with torch.device("meta"):
        published: Any = OpenaiDvae(OpenaiDvaeConfig())
    assert published.config.image_seq_len == 1024
    widths = [published.encoder.blocks[f"group_{group}"][0].res_path.conv_4.w.shape[0] for group in range(1, 5)]
    assert widths == [256, 512, 1024, 2048]
    assert math.isclose(published.encoder.blocks["group_1"][0].gain, 1 / 64)


# ---------------------------------------------------------------------------------------------- what files leave open


@pytest.mark.slow
def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    """A checkpoint of another name, one of the dVAE's two files, the legacy format, and TorchScript."""
    shutil.copy(_discrete_vae(tmp_path / "a", DISCRETE), tmp_path / "model.ckpt")
    assert import_checkpoint(tmp_path / "model.ckpt", tmp_path / "1").kind == "discrete-vae"
    _openai(tmp_path / "b", OPENAI, zipped=False)
    (tmp_path / "b" / "encoder.pkl").rename(tmp_path / "b" / "x.bin")
    options = ImportOptions(image_size=32)
    found = import_checkpoint(tmp_path / "b" / "x.bin", tmp_path / "2", options=options)
    assert (found.kind, found.parts["vqgan"].config) == ("openai-dvae", OPENAI)

    class Part(nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.blocks = network.blocks

        def forward(self, stream: Tensor) -> Tensor:
            return stream

    codec: OpenaiDvae = _codec(OPENAI)
    (tmp_path / "c").mkdir()
    for name, network in (("e", codec.encoder), ("d", codec.decoder)):
        torch.jit.script(Part(network)).save(str(tmp_path / "c" / name))
    import_checkpoint(tmp_path / "c", tmp_path / "3", options=options)
    imported = load_part(tmp_path / "3", "vqgan")
    assert torch.equal(imported.encode(_images(OPENAI)), codec.encode(_images(OPENAI)))


def test_what_no_file_states_is_assumed_aloud(tmp_path: Path) -> None:
    path = _taming(tmp_path / "source", VQGAN)
    (path.parent / "project.yaml").unlink()
    found = import_checkpoint(path, tmp_path / "model")
    assert found.parts["vqgan"].config.image_size == 256  # type: ignore[attr-defined]
    assert any("256 pixels assumed" in note for note in found.notes)
    assert "256 pixels assumed" in (tmp_path / "model" / "model_card.md").read_text()
    other = import_checkpoint(path, tmp_path / "model", options=ImportOptions(image_size=64))
    assert other.parts["vqgan"].config.attention_resolutions == (32,)  # type: ignore[attr-defined]


def test_the_yaml_of_tamings_logs_is_found(tmp_path: Path) -> None:
    path = _taming(tmp_path / "checkpoints", VQGAN)
    (tmp_path / "configs").mkdir()
    (path.parent / "project.yaml").rename(tmp_path / "configs" / "2021-project.yaml")
    assert import_checkpoint(path, tmp_path / "model").parts["vqgan"].config == VQGAN
    shutil.copy(tmp_path / "configs" / "2021-project.yaml", tmp_path / "configs" / "2022-project.yaml")
    with pytest.raises(InputError, match=r"several yaml files near it \(2021-project.yaml, 2022-project.yaml\)"):
        import_checkpoint(path, tmp_path / "model")
    options = ImportOptions(config=tmp_path / "configs" / "2022-project.yaml")
    assert import_checkpoint(path, tmp_path / "model", options=options).parts["vqgan"].config == VQGAN


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = _discrete_vae(tmp_path / "source", DISCRETE)
    content = torch.load(path)
    content["weights"]["decoder.3.0.weight"] = torch.zeros(12, 11, 4, 4)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"decoder.3.0.weight: \[12, 11, 4, 4\]: .* require \[12, 12, 4, 4\]"):
        import_checkpoint(path, tmp_path / "model")
    del content["weights"]["decoder.3.0.weight"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"decoder.3.0.weight: missing: .*\[12, 12, 4, 4\]"):
        import_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_tokens: 31: its tensors say 30"):
        import_checkpoint(_discrete_vae(tmp_path / "a", DISCRETE, num_tokens=31), tmp_path / "model")
    path = _taming(tmp_path / "b", VQGAN)
    text = (path.parent / "project.yaml").read_text()
    (path.parent / "project.yaml").write_text(text.replace("n_embed: 40", "n_embed: 1024"))
    with pytest.raises(InputError, match="n_embed: 1024: its tensors say 40"):
        import_checkpoint(path, tmp_path / "model")


def test_half_a_dvae_is_refused(tmp_path: Path) -> None:
    folder = _openai(tmp_path / "source", OPENAI)
    (folder / "decoder.pkl").unlink()
    for source in (folder, folder / "encoder.pkl"):
        with pytest.raises(InputError, match="is the encoder of an OpenAI dVAE, and 0 files beside it are its decoder"):
            import_checkpoint(source, tmp_path / "model")


def test_other_faults(tmp_path: Path) -> None:
    path = _discrete_vae(tmp_path / "source", DISCRETE)
    with pytest.raises(InputError, match=r"--kind: koclip: .* holds a DALLE-pytorch DiscreteVAE: write discrete-vae"):
        import_checkpoint(path, tmp_path / "model", kind="koclip")
    with pytest.raises(InputError, match="no such file or folder"):
        import_checkpoint(tmp_path / "missing.pt", tmp_path / "model")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(InputError, match=r"is no file of torch.save"):
        import_checkpoint(tmp_path / "text.pt", tmp_path / "model")
    with pytest.raises(InputError, match="holds no checkpoint"):
        import_checkpoint(tmp_path, tmp_path / "model")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"is no complete file of torch.save"):
        import_checkpoint(path, tmp_path / "model")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something other than a model"):
        import_checkpoint(_discrete_vae(tmp_path / "b", DISCRETE), tmp_path / "taken")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "source", "taken", "text.pt"]


def test_only_vqgans_are_trained() -> None:
    with pytest.raises(InputError, match="gumbel-vqgan: is imported and not trained here"):
        Vqgan(GUMBEL)
