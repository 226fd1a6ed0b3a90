"""Reader of KoCLIP's whole pickled modules (`clip.pt`): timm's EfficientNet and RoBERTa under transformers' names.

Sizes come from the tensors alone. The number of attention heads is no tensor's: it is read from the pickled RobertaConfig,
or 64 channels a head are assumed, as in every published RoBERTa.
"""

import math
import re
from pathlib import Path
from typing import Any

from engine.config.ranker import KoclipConfig
from engine.config.section import parse_section
from engine.errors import InputError
from engine.interop.pickle_values import Record
from engine.interop.trees import Weights, plain
from engine.models.koclip_encoders import efficientnet_width

_STEM = {"conv_stem": "embeddings.convolution", "bn1": "embeddings.batchnorm"}
_TOP = {"conv_head": "encoder.top_conv", "bn2": "encoder.top_bn"}
_SQUEEZE = {"se.conv_reduce": "squeeze_excite.reduce", "se.conv_expand": "squeeze_excite.expand"}
_INVERTED = _SQUEEZE | {  # blocks that expand, project, and squeeze between
    "conv_pw": "expansion.expand_conv", "bn1": "expansion.expand_bn",
    "conv_dw": "depthwise_conv.depthwise_conv", "bn2": "depthwise_conv.depthwise_norm",
    "conv_pwl": "projection.project_conv", "bn3": "projection.project_bn",
}  # fmt: skip
_SEPARABLE = _SQUEEZE | {  # the first stage's, which do not expand
    "conv_dw": "depthwise_conv.depthwise_conv", "bn1": "depthwise_conv.depthwise_norm",
    "conv_pw": "projection.project_conv", "bn2": "projection.project_bn",
}  # fmt: skip
_IMAGE, _TEXT = "image_encoder.model.", "text_encoder.model."
_MOST_WIDTH = 4.0
_CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320)  # of EfficientNet-B0: stem, then each stage's output
_REPEATS = (1, 2, 2, 3, 3, 4, 1)


def is_koclip(names: set[str]) -> bool:
    """Whether a module's tensors are a KoCLIP's, of any encoders."""
    return {"image_projection.projection.weight", "text_projection.projection.weight"} <= names


def read_koclip(weights: Weights, module: Record | None, source: Path) -> tuple[KoclipConfig, Weights, list[str]]:
    """A KoCLIP: config, weights under our names, notes.

    Raises:
        InputError: encoders other than EfficientNet and RoBERTa (the oldest KoCLIPs), or sizes that no EfficientNet has.
    """
    if f"{_IMAGE}conv_stem.weight" not in weights or f"{_TEXT}embeddings.token_type_embeddings.weight" not in weights:
        found = ", ".join(sorted({".".join(name.split(".")[:3]) for name in weights})[:6])
        raise InputError(
            "KoCLIP", source, f"its encoders are not EfficientNet and RoBERTa (it has {found}): the oldest KoCLIPs, of "
            "ResNet-50 and DistilBERT, are not supported"
        )  # fmt: skip
    repeats = _stage_repeats(weights, source)
    renamed, dropped = {}, 0
    for name, value in weights.items():
        ours = _our_name(name, repeats)
        if ours is None:
            dropped += 1
        else:
            renamed[ours] = value
    words, embed = (
        _shape(weights, f"{_TEXT}embeddings.word_embeddings.weight", source),
        _shape(weights, "image_projection.projection.weight", source),
    )
    positions = _shape(weights, f"{_TEXT}embeddings.position_embeddings.weight", source)
    layers = {int(match[1]) for match in map(re.compile(rf"{_TEXT}encoder\.layer\.(\d+)\.").match, weights) if match}
    feed_forward = _shape(weights, f"{_TEXT}encoder.layer.0.intermediate.dense.weight", source)
    width = _image_width(weights, repeats, source)
    tree = {
        "image_width": width,
        "image_depth": _image_depth(repeats, source),
        "image_hidden_dim": embed[1],
        "text_vocab_size": words[0],
        "text_seq_len": min(128, positions[0] - 2),
        "text_dim": words[1],
        "text_layers": len(layers),
        "text_heads": _heads(module) or max(1, words[1] // 64),
        "text_ff_dim": feed_forward[0],
        "text_position_rows": positions[0],
        "embed_dim": embed[0],
        "head": "mlp" if "image_projection.fc.weight" in weights else "linear",
        "similarity": "published",
    }
    notes = [f"{dropped} tensors without use left out (position numbers)"] if dropped else []
    if efficientnet_width(width) != embed[1]:
        raise InputError(f"{source} image_projection.projection.weight", list(embed),
                         f"an EfficientNet of width {width} makes {efficientnet_width(width)} features")  # fmt: skip
    return parse_section(KoclipConfig, tree, source=str(source)), renamed, notes


def _our_name(name: str, repeats: tuple[int, ...]) -> str | None:
    """transformers' name of a tensor; None: a buffer that it computes."""
    if name.startswith(_TEXT):
        rest = name.removeprefix(_TEXT)
        return None if rest in ("embeddings.position_ids", "embeddings.token_type_ids") else f"text_encoder.{rest}"
    if not name.startswith(_IMAGE):
        return name
    module, _, leaf = name.removeprefix(_IMAGE).rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", module)
    if block:
        stage, number = int(block[1]), int(block[2])
        table = _INVERTED if stage else _SEPARABLE
        if block[3] in table and stage < len(repeats):
            return f"image_encoder.encoder.blocks.{sum(repeats[:stage]) + number}.{table[block[3]]}.{leaf}"
    elif module in _STEM | _TOP:
        return f"image_encoder.{(_STEM | _TOP)[module]}.{leaf}"
    return name  # the comparison with the config's tensors names it


def _stage_repeats(weights: Weights, source: Path) -> tuple[int, ...]:
    """Blocks of each stage."""
    matches = map(re.compile(rf"{re.escape(_IMAGE)}blocks\.(\d+)\.(\d+)\.").match, weights)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    stages = 1 + max((stage for stage, _ in blocks), default=-1)
    if stages != len(_REPEATS):
        raise InputError(
            "KoCLIP", source, f"its image encoder has {stages} stages, an EfficientNet has {len(_REPEATS)}"
        )
    return tuple(sum(1 for stage, _ in blocks if stage == wanted) for wanted in range(stages))


def _image_depth(repeats: tuple[int, ...], source: Path) -> float:
    """A depth coefficient that gives each stage its number of blocks: 1.0 where that does."""
    for depth in (1.0, *(number / 20 for number in range(1, 81))):
        if tuple(math.ceil(depth * repeat) for repeat in _REPEATS) == repeats:
            return depth
    raise InputError("KoCLIP", source, f"its image encoder has {list(repeats)} blocks, as no EfficientNet")


def _image_width(weights: Weights, repeats: tuple[int, ...], source: Path) -> float:
    """A width coefficient that gives stem and stages their channels: 1.0 where that does."""
    found = [_shape(weights, f"{_IMAGE}conv_stem.weight", source)[0]]
    for stage in range(len(repeats)):
        last = "conv_pwl" if stage else "conv_pw"
        found.append(_shape(weights, f"{_IMAGE}blocks.{stage}.0.{last}.weight", source)[0])
    top = _shape(weights, f"{_IMAGE}conv_head.weight", source)[0]
    for width in (1.0, *(number / 20 for number in range(1, int(20 * _MOST_WIDTH) + 1))):
        if [_rounded(channels * width) for channels in _CHANNELS] == found and efficientnet_width(width) == top:
            return width
    raise InputError("KoCLIP", source, f"its image encoder has {found} channels, as no EfficientNet")


def _rounded(channels: float) -> int:
    """To a multiple of 8, at most a tenth down, as both libraries."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _heads(module: Record | None) -> int | None:
    """Attention heads of the pickled RobertaConfig."""
    state: Any = None if module is None else module.state
    for name in ("_modules", "text_encoder", "_modules", "model", "config"):
        state = state.get(name) if isinstance(state, dict) else None
        state = state.state if isinstance(state, Record) and name != "config" else state
    config = plain(state)
    heads = config.get("num_attention_heads") if isinstance(config, dict) else None
    return heads if type(heads) is int and heads > 0 else None


def _shape(weights: Weights, name: str, source: Path) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"{source} {name}", "missing", "a KoCLIP has such a tensor")
    return weights[name].shape
