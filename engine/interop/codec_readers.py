"""Readers of other projects' codecs: taming's VQModel and GumbelVQ, DALLE-pytorch's DiscreteVAE, OpenAI's dVAE.

Sizes come from the tensors, and only what they do not show (the image's size) from the file's config; where both say
something, they are compared. Each reader returns the config of our module and its weights under our names, not read yet.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.codec import DiscreteVaeConfig, OpenaiDvaeConfig, VqganConfig
from engine.config.section import parse_section
from engine.errors import InputError
from engine.interop.trees import Weights, number
from engine.models.weight_file import LazyTensor

PUBLISHED_IMAGE_SIZE = 256  # of every published codec of these families


def is_taming(names: set[str]) -> bool:
    """Whether a state dict is one of taming's autoencoders."""
    return "encoder.conv_in.weight" in names and "quant_conv.weight" in names


def read_taming(
    weights: Weights, config: Mapping[Any, Any], source: Path, *, image_size: int | None
) -> tuple[VqganConfig, Weights, list[str]]:
    """A VQModel or GumbelVQ: config, weights, notes.

    Args:
        config: `model.params` of taming's yaml; empty where there is none.
        image_size: another one than the config's: the network takes any; None: the config's.

    Raises:
        InputError: tensors of something else, or sizes that differ from the config's.
    """
    kept = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    notes = []
    if len(kept) < len(weights):
        notes.append(f"{len(weights) - len(kept)} tensors of the loss (LPIPS, discriminator) left out")
    ours = {"colorize"} & kept.keys()
    kept = {name: value for name, value in kept.items() if name not in ours}
    is_gumbel = "quantize.embed.weight" in kept
    codebook = _shape(kept, "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", source, dims=2)
    first, last = (
        _shape(kept, "encoder.conv_in.weight", source, dims=4),
        _shape(kept, "quant_conv.weight", source, dims=4),
    )
    levels = 1 + max(_numbers(kept, r"encoder\.down\.(\d+)\."), default=0)
    base = first[0]
    widths = [_shape(kept, f"encoder.down.{level}.block.0.conv1.weight", source, dims=4)[0] for level in range(levels)]
    if any(width % base for width in widths):
        raise InputError(f"{source} encoder.down", widths, f"channels are no multiples of the first layer's {base}")
    if first[1] != 3:
        raise InputError(f"{source} encoder.conv_in.weight", list(first), "is not of three-channel images")
    if last[1] != _shape(kept, "encoder.conv_out.weight", source, dims=4)[0]:
        raise InputError(f"{source} encoder.conv_out.weight", list(kept["encoder.conv_out.weight"].shape),
                         f"quant_conv.weight {list(last)} takes another number of channels (double_z?)")  # fmt: skip
    stated = config.get("ddconfig") if isinstance(config.get("ddconfig"), Mapping) else {}
    assert isinstance(stated, Mapping)
    if image_size is None and "resolution" in stated:
        image_size = number(stated, "resolution", f"{source} ddconfig")
    if image_size is None:
        image_size = PUBLISHED_IMAGE_SIZE
        notes.append(f"no yaml beside the checkpoint: images of {image_size} pixels assumed (--image-size)")
    with_attention = sorted(
        {image_size >> level for level in _numbers(kept, r"encoder\.down\.(\d+)\.attn\.")}, reverse=True
    )
    tree = {
        "family": "gumbel-vqgan" if is_gumbel else "vqgan",
        "image_size": image_size,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": 1 + max(_numbers(kept, r"encoder\.down\.0\.block\.(\d+)\."), default=0),
        "attention_resolutions": with_attention,
        "latent_channels": last[1],
        "embed_dim": last[0],
        "codebook_size": codebook[0],
        "norm_groups": 32,
    }
    for key, ours_key in (
        ("ch", "base_channels"),
        ("z_channels", "latent_channels"),
        ("num_res_blocks", "num_res_blocks"),
    ):
        _same(stated, key, tree[ours_key], source)
    for key, ours_key in (("n_embed", "codebook_size"), ("embed_dim", "embed_dim")):
        _same(config, key, tree[ours_key], source)
    if "ch_mult" in stated:
        if not isinstance(stated["ch_mult"], list | tuple):
            raise InputError(f"{source} ddconfig ch_mult", stated["ch_mult"], "must be a list of whole numbers")
        _same({"ch_mult": list(stated["ch_mult"])}, "ch_mult", tree["channel_multipliers"], source)
    return parse_section(VqganConfig, tree, source=str(source)), kept, notes


def is_discrete_vae(names: set[str]) -> bool:
    """Whether a state dict is one of DALLE-pytorch's DiscreteVAE."""
    return {"codebook.weight", "encoder.0.0.weight"} <= names


def read_discrete_vae(
    weights: Weights, hparams: Mapping[Any, Any], source: Path, *, image_size: int | None
) -> tuple[DiscreteVaeConfig, Weights, list[str]]:
    """A DiscreteVAE of `vae.pt`: config, weights, notes.

    Args:
        hparams: what it was made with; the image's size is only there.
        image_size: another one than theirs; None: theirs.

    Raises:
        InputError: tensors of something else, or sizes that differ from hparams.
    """
    codebook, first = (
        _shape(weights, "codebook.weight", source, dims=2),
        _shape(weights, "encoder.0.0.weight", source, dims=4),
    )
    tree = {
        "image_size": image_size or number(hparams, "image_size", f"{source} hparams"),
        "image_channels": first[1],
        "num_layers": len(_numbers(weights, r"encoder\.(\d+)\.0\.weight")),
        "hidden_channels": first[0],
        "num_res_blocks": len(_numbers(weights, r"encoder\.(\d+)\.net\.0\.weight")),
        "embed_dim": codebook[1],
        "codebook_size": codebook[0],
    }
    stated = {
        "num_layers": "num_layers", "num_tokens": "codebook_size", "codebook_dim": "embed_dim",
        "hidden_dim": "hidden_channels", "num_resnet_blocks": "num_res_blocks", "channels": "image_channels",
    }  # fmt: skip
    for key, ours in stated.items():
        _same(hparams, key, tree[ours], source)
    return parse_section(DiscreteVaeConfig, tree, source=str(source)), dict(weights), []


def openai_side(weights: Mapping[str, LazyTensor]) -> str | None:
    """`encoder` or `decoder` of OpenAI's dVAE, by the input convolution's kernel; None: neither."""
    entry = weights.get("blocks.input.w")
    if entry is None or len(entry.shape) != 4 or "blocks.output.conv.w" not in weights:
        return None
    return "encoder" if entry.shape[-1] == 7 else "decoder"


def read_openai_dvae(
    encoder: Weights, decoder: Weights, source: Path, *, image_size: int | None
) -> tuple[OpenaiDvaeConfig, Weights, list[str]]:
    """OpenAI's dVAE of two files: config, weights, notes.

    Raises:
        InputError: tensors of something else, or an encoder and a decoder of two models.
    """
    codes, hidden = (
        _shape(encoder, "blocks.output.conv.w", source, dims=4)[0],
        _shape(encoder, "blocks.input.w", source, dims=4)[0],
    )
    entry = _shape(decoder, "blocks.input.w", source, dims=4)
    if entry[1] != codes:
        raise InputError(
            f"{source} blocks.input.w", list(entry), f"the decoder's codes are not the encoder's {codes}: two models"
        )
    notes = []
    if image_size is None:
        image_size = PUBLISHED_IMAGE_SIZE
        notes.append(f"the files do not state the images' size: {image_size} pixels assumed (--image-size)")
    tree = {
        "image_size": image_size,
        "hidden_channels": hidden,
        "decoder_channels": entry[0],
        "blocks_per_group": len(_numbers(encoder, r"blocks\.group_1\.block_(\d+)\.")),
        "codebook_size": codes,
    }
    weights = {f"encoder.{name}": value for name, value in encoder.items()}
    weights |= {f"decoder.{name}": value for name, value in decoder.items()}
    return parse_section(OpenaiDvaeConfig, tree, source=str(source)), weights, notes


def _numbers(weights: Mapping[str, LazyTensor], pattern: str) -> set[int]:
    """The numbers that stand in names at `pattern`'s group."""
    return {int(match[1]) for match in map(re.compile(pattern).match, weights) if match}


def _shape(weights: Mapping[str, LazyTensor], name: str, source: Path, *, dims: int) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"{source} {name}", "missing", "this kind of codec has such a tensor")
    shape = weights[name].shape
    if len(shape) != dims:
        raise InputError(f"{source} {name}", list(shape), f"must have {dims} dimensions")
    return shape


def _same(stated: Mapping[Any, Any], key: str, found: Any, source: Path) -> None:
    """Raises InputError: the file's config says something else than its tensors."""
    value = stated.get(key)
    if value is not None and value != found:
        raise InputError(f"{source} {key}", value, f"its tensors say {found}: config and weights are of two models")
