"""Readers of transformers: KoDALLE, and DALLE-pytorch 1.1 to 1.6 where the transformer here has their switches.

    theirs                                              ours
    text_emb.weight, text_pos_emb.weight                text_embedding.tokens, .positions
    image_emb.weight, image_pos_emb.weights_0, _1       image_embedding.tokens, .rows, .columns
    transformer.layers.layers.<i>.0.fn…                 layers.<i>.attention…
    transformer.layers.layers.<i>.1.fn…                 layers.<i>.feed_forward…
    transformer.layers.blocks.<i>.f.net, .g.net         the same of reversible models
    to_logits.0, to_logits.1                            head.norm, head.weight and .bias
    vae.…                                               the codec (engine.interop.codec_readers)

The number of `fn.` in a name depends on the version; what counts is the switch that adds some. Layers and embeddings that share
weights become equal copies: the same function, but training on no longer ties them.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.section import parse_section
from engine.config.transformer import TransformerConfig
from engine.errors import InputError
from engine.interop.trees import Weights, number
from engine.models.weight_file import LazyTensor
from engine.models.whole_sequence import rotary_angles

# A layer's number, its branch and what it is in it; the second form is that of reversible models.
_LAYER = re.compile(r"transformer\.layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.(.+)")
_LEAVES = {
    "attention": {"to_qkv.weight": "attention.qkv.weight", "to_out.0.weight": "attention.out.weight", "to_out.0.bias": "attention.out.bias"},
    "feed_forward": {
        "net.0.weight": "feed_forward.grow.weight", "net.0.bias": "feed_forward.grow.bias",
        "net.3.weight": "feed_forward.shrink.weight", "net.3.bias": "feed_forward.shrink.bias",
    },
}  # fmt: skip
_BRANCHES = {"0": "attention", "1": "feed_forward", "f": "attention", "g": "feed_forward"}
_TABLES = {
    "text_emb.weight": "text_embedding.tokens", "text_pos_emb.weight": "text_embedding.positions",
    "image_emb.weight": "image_embedding.tokens", "image_pos_emb.weights_0": "image_embedding.rows",
    "image_pos_emb.weights.0": "image_embedding.rows", "image_pos_emb.weights_1": "image_embedding.columns",
    "image_pos_emb.weights.1": "image_embedding.columns", "to_logits.0.weight": "head.norm.weight",
    "to_logits.0.bias": "head.norm.bias", "to_logits.1.weight": "head.weight", "to_logits.1.bias": "head.bias",
}  # fmt: skip
# Computed when they are loaded; the shared embeddings' are read from the head.
_COMPUTED = re.compile(
    r"(logits_mask|labels|null_.*|(text|image)_emb\.linear\.(weight|bias)|.*\.(pos_emb|freqs|causal_mask|static_mask))"
)


@dataclass(frozen=True)
class DalleTransformer:
    """What a checkpoint holds beside its codec."""

    config: TransformerConfig
    weights: Weights
    notes: list[str]
    is_kodalle: bool


def is_dalle(names: set[str]) -> bool:
    """Whether a state dict is one of DALLE-pytorch's or KoDALLE's transformers."""
    return "to_logits.1.weight" in names and any(name.startswith("transformer.layers.") for name in names)


def codec_weights(weights: Weights) -> tuple[str, Weights]:
    """The codec in a transformer's checkpoint: its class and its tensors under their own names.

    Returns:
        `vqgan`, `openai-dvae` or `discrete-vae`, and the tensors; no tensors: it was saved without one.
    """
    own = {name.removeprefix("vae."): value for name, value in weights.items() if name.startswith("vae.")}
    if any(name.startswith("model.") for name in own):
        return "vqgan", {name.removeprefix("model."): value for name, value in own.items()}
    if any(name.startswith("enc.blocks.") for name in own):
        return "openai-dvae", own
    return "discrete-vae", own


def read_dalle(weights: Weights, hparams: Mapping[Any, Any], source: Path, *, version: str | None) -> DalleTransformer:
    """The transformer of a checkpoint: config, weights under our names, notes.

    Args:
        version: of DALLE-pytorch, where the file states it.

    Raises:
        InputError: attention that this engine's transformer does not have, by name, or sizes that differ from hparams.
    """
    own = {name: value for name, value in weights.items() if not name.startswith("vae.")}
    rows, vocab = _shape(own, "to_logits.1.weight", source), number(hparams, "num_text_tokens", f"{source} hparams")
    length = number(hparams, "text_seq_len", f"{source} hparams")
    heads = number(hparams, "heads", f"{source} hparams")
    qkv = own[next(name for name in own if name.endswith("to_qkv.weight"))].shape
    notes = []
    if "text_emb.linear.weight" in own:
        own = own | _shared_tables(own, vocab + length)
        notes.append("its embeddings are rows of its head; here they are copies, which training on no longer ties")
    if hparams.get("shared_attn_ids") or hparams.get("shared_ff_ids"):
        notes.append("its layers share weights; here they are copies, which training on no longer ties")
    table = _shape(own, "text_emb.weight", source)
    angles = own.get("transformer.pos_emb")
    if angles is None:
        grid = _shape(own, _first(own, "image_pos_emb.weights_0", "image_pos_emb.weights.0"), source)[1]
        positions = _shape(own, "text_pos_emb.weight", source)[0]
    else:
        grid, positions = math.isqrt(max(0, angles.shape[1] - 1 - length)), 1 + length
    # DALLE-pytorch gives each padded position a row of its own after the vocabulary; KoDALLE took the rows out.
    unique_padding = table[0] == vocab + length
    config = {
        "dim": rows[1],
        "num_layers": 1 + max(place[0] for place in map(_place, own) if place),
        "num_heads": heads,
        "head_dim": qkv[0] // 3 // heads,
        "ff_mult": _shape(own, _named(own, "net.3.weight", source), source)[1] // rows[1],
        "attention_dropout": _share(hparams, "attn_dropout"),
        "ff_dropout": _share(hparams, "ff_dropout"),
        "text_vocab_size": vocab,
        "text_seq_len": length,
        "text_position_rows": positions,
        "image_vocab_size": rows[0] - vocab - length,
        "image_grid_size": grid,
        "unique_padding": unique_padding,
        "reversible": any(name.startswith("transformer.layers.blocks.") for name in own),
        "sandwich_norm": any(".norm_out." in name for name in own),
        # KoDALLE's yaml has the text 'None' for it, which switched it on; hparams keep the text.
        "stable": bool(hparams.get("stable")),
        "rotary": angles is not None,
        "token_shift": _shifts_tokens(own),
        "attention_patterns": _patterns(hparams, version, source),
    }
    for key, ours in (("depth", "num_layers"), ("dim", "dim"), ("dim_head", "head_dim")):
        if type(hparams.get(key)) is int and hparams[key] != config[ours]:
            raise InputError(f"{source} hparams {key}", hparams[key], f"its tensors say {config[ours]}")
    renamed: Weights = {}
    for name, value in own.items():
        renamed_to = _our_name(name)
        if renamed_to is not None:
            renamed[renamed_to] = _flat(value)
    section: TransformerConfig = parse_section(TransformerConfig, config, source=str(source))
    if angles is not None:
        _check_angles(angles, section, source)
    if "conv_symmetric" in section.attention_patterns:
        notes.append("conv_like attention is read as before DALLE-pytorch 1.5: the file states no later version")
    return DalleTransformer(section, renamed, notes, is_kodalle=not unique_padding)


def _patterns(hparams: Mapping[Any, Any], version: str | None, source: Path) -> list[str]:
    """Attention patterns under our names.

    Raises:
        InputError: DeepSpeed's sparse attention, or gMLP.
    """
    types = hparams.get("attn_types") or ["full"]
    types = [types] if isinstance(types, str) else list(types)
    # Since 1.5.0 the window lies up and to the left; older files do not say their version.
    numbers = [int(part) for part in re.findall(r"\d+", version or "")[:2]] or [0]
    conv = "conv" if numbers >= [1, 5] else "conv_symmetric"
    ours = {"full": "full", "axial_row": "axial_row", "axial_col": "axial_col", "conv_like": conv}
    other = [str(kind) for kind in types if kind not in ours]
    if other:
        raise InputError(
            f"{source} hparams attn_types", ", ".join(other), "are not supported: only full, axial and conv_like are"
        )
    return [ours[kind] for kind in types]


def _shifts_tokens(weights: Weights) -> bool:
    """Whether token shift wraps the feed-forward branches; hparams may have a text or nothing."""
    places = [place for place in map(_place, weights) if place]
    return any(path.endswith("net.0.weight") and path != "fn.fn.net.0.weight" for _, _, path in places)


def _check_angles(table: LazyTensor, config: TransformerConfig, source: Path) -> None:
    """Raises InputError: rotary angles other than those that are computed here."""
    ours = rotary_angles(config.prefix_len, config.image_grid_size, config.head_dim, torch.device("cpu"))
    if table.shape[1:] != ours.shape or not torch.allclose(table.read()[0].float(), ours, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"{source} transformer.pos_emb", list(table.shape), "are other angles than DALLE-pytorch 1.0.2 to 1.6 computes"
        )  # fmt: skip


def _our_name(name: str) -> str | None:
    """Our name of a tensor; itself where it is unknown, which the comparison names; None: it is computed."""
    if name in _TABLES:
        return _TABLES[name]
    if _COMPUTED.fullmatch(name):
        return None
    place = _place(name)
    if place is None:
        return name
    layer, branch, path = place
    if path == "scale":
        return f"layers.{layer}.{branch}.scale"
    if path.startswith(("fn.norm.", "fn.norm_out.")):
        return f"layers.{layer}.{branch}.{path.removeprefix('fn.')}"
    leaf = _LEAVES[branch].get(re.sub(r"^(fn\.)+", "", path))
    return name if leaf is None else f"layers.{layer}.{leaf}"


def _place(name: str) -> tuple[int, str, str] | None:
    """A layer's number, `attention` or `feed_forward`, and the rest of the name; None: it is of no layer."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    return int(match[1] or match[3]), _BRANCHES[match[2] or match[4]], match[5]


def _first(weights: Weights, *names: str) -> str:
    return next((name for name in names if name in weights), names[0])


def _named(weights: Weights, ending: str, source: Path) -> str:
    found = [name for name in weights if name.endswith(ending)]
    if not found:
        raise InputError(f"{source} …{ending}", "missing", "this kind of transformer has it in every layer")
    return min(found)


def _shared_tables(weights: Weights, num_text_rows: int) -> Weights:
    """Both tables of a model whose embeddings are rows of its head."""
    head = weights["to_logits.1.weight"]

    def rows(start: int, stop: int) -> LazyTensor:
        read: Callable[[], Tensor] = lambda: head.read()[start:stop]
        return LazyTensor((stop - start, *head.shape[1:]), head.dtype, read)

    return {"text_emb.weight": rows(0, num_text_rows), "image_emb.weight": rows(num_text_rows, head.shape[0])}


def _flat(tensor: LazyTensor) -> LazyTensor:
    """(1, 1, C) -> (C,) and (1, g, 1, C) -> (g, C): without the axes of size one that stand before the last."""
    shape = (*(size for size in tensor.shape[:-1] if size != 1), *tensor.shape[-1:])
    if len(tensor.shape) < 3 or shape == tensor.shape:
        return tensor
    return LazyTensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))


def _share(hparams: Mapping[Any, Any], key: str) -> float:
    value = hparams.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _shape(weights: Weights, name: str, source: Path) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"{source} {name}", "missing", "this kind of transformer has such a tensor")
    return weights[name].shape
