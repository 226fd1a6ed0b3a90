"""Reader of minDALL-E's transformers: text to image (`Transformer1d`), and class-conditional or unconditional ones (`iGPT`).

    theirs                                             ours
    tok_emb_txt, pos_emb_txt                           text_embedding.tokens, .positions
    sos.weight (classes), sos (one)                    text_embedding.tokens of condition class, nothing
    tok_emb_img, pos_emb_img                           image_embedding.tokens, .cells
    blocks.<i>.ln1, .attn.{query,key,value}, .proj     layers.<i>.attention.norm, .qkv (one after the other), .out
    blocks.<i>.ln2, .mlp.0, .mlp.2                     layers.<i>.feed_forward.norm, .grow, .shrink
    ln_f; head_txt, head_img; head                     head.norm; head.weight, text rows first

A checkpoint of its transfer learning has `stage1.` and `stage2.` before the codec's names and the transformer's. The number of heads
is in no tensor: it stands in the yaml.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from engine.config.section import parse_section
from engine.config.transformer import TransformerConfig
from engine.data.class_tokenizer import class_tokenizer, unconditional_tokenizer
from engine.data.tokenizer import CaptionTokenizer
from engine.data.tokenizer_files import SpecialTokens
from engine.errors import InputError
from engine.interop.checkpoint import yaml_trees
from engine.interop.trees import Weights, number
from engine.models.weight_file import LazyTensor

# What OmegaConf fills in where the yaml leaves it out.
_DEFAULTS: dict[Any, Any] = {
    "n_heads": 24,
    "gelu_use_approx": False,
    "attn_bias": True,
    "mlp_bias": True,
    "resid_pdrop": 0.0,
}
_LEAVES = {
    "ln1.weight": "attention.norm.weight", "ln1.bias": "attention.norm.bias", "ln2.weight": "feed_forward.norm.weight",
    "ln2.bias": "feed_forward.norm.bias", "attn.proj.weight": "attention.out.weight", "attn.proj.bias": "attention.out.bias",
    "mlp.0.weight": "feed_forward.grow.weight", "mlp.0.bias": "feed_forward.grow.bias",
    "mlp.2.weight": "feed_forward.shrink.weight", "mlp.2.bias": "feed_forward.shrink.bias",
}  # fmt: skip
_TABLES = {
    "tok_emb_txt.weight": "text_embedding.tokens", "pos_emb_txt.weight": "text_embedding.positions",
    "tok_emb_img.weight": "image_embedding.tokens", "pos_emb_img.weight": "image_embedding.cells",
    "ln_f.weight": "head.norm.weight", "ln_f.bias": "head.norm.bias", "sos.weight": "text_embedding.tokens",
}  # fmt: skip
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_MAX_TOKENIZER_BYTES = 8 << 20
_UNKNOWN, _PADDING, _WORD_END = "[UNK]", "[PAD]", "</w>"


@dataclass(frozen=True)
class MindalleTransformer:
    """What a checkpoint holds beside its codec."""

    config: TransformerConfig
    weights: Weights
    notes: list[str]


def is_mindalle(names: Iterable[str]) -> bool:
    """Whether a state dict has one of minDALL-E's transformers."""
    own = {name.removeprefix("stage2.") for name in names}
    return {"tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.attn.key.weight"} <= own


def stages(weights: Weights) -> tuple[Weights, Weights]:
    """(codec, transformer) of a checkpoint, under their own names; no tensors: it is saved without."""
    if not any(name.startswith("stage2.") for name in weights):
        return {}, weights
    codec, transformer = (
        {name.removeprefix(stage): value for name, value in weights.items() if name.startswith(stage)}
        for stage in ("stage1.", "stage2.")
    )
    return codec, transformer


def mindalle_config(checkpoint: Path, config: Path | None) -> dict[Any, Any]:
    """The yaml of a checkpoint, with sections `stage1` and `stage2`.

    Args:
        config: the yaml; None: looked for beside the checkpoint.

    Raises:
        InputError: there is none, or several that could be meant.
    """
    found = {
        path: tree
        for path, tree in yaml_trees([checkpoint.parent] if config is None else config)
        if isinstance(tree, dict) and isinstance(tree.get("stage2"), dict)
    }
    same_name = [path for path in found if path.stem == checkpoint.stem]
    if len(found) > 1 and len(same_name) != 1:
        names = ", ".join(sorted(path.name for path in found)[:5])
        raise InputError("checkpoint", checkpoint, f"has several yaml files near it ({names}): give one with --config")
    if not found:
        raise InputError(
            "checkpoint" if config is None else "--config", config or checkpoint,
            "has no yaml with a section stage2 beside it, which states the number of heads: give minDALL-E's with --config"
            if config is None
            else "has no section stage2: give minDALL-E's yaml",
        )  # fmt: skip
    return found[same_name[0]] if len(same_name) == 1 else next(iter(found.values()))


def codec_config(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """`stage1` of the yaml as taming names the same."""
    stage = tree.get("stage1")
    if not isinstance(stage, Mapping):
        return {}
    return {"ddconfig": stage.get("hparams"), "n_embed": stage.get("n_embed"), "embed_dim": stage.get("embed_dim")}


def read_mindalle(weights: Weights, tree: Mapping[Any, Any], source: Path) -> MindalleTransformer:
    """The transformer of a checkpoint: config, weights under our names, notes.

    Args:
        tree: the yaml.

    Raises:
        InputError: sizes that differ from the yaml's, or that make no model.
    """
    stage = tree["stage2"]
    hparams = _DEFAULTS | (dict(stage["hparams"]) if isinstance(stage.get("hparams"), Mapping) else {})
    codes, dim = _shape(weights, "tok_emb_img.weight", source)
    num_cells = _shape(weights, "pos_emb_img.weight", source)[0]
    heads = number(hparams, "n_heads", f"{source} stage2.hparams")
    grid = math.isqrt(num_cells)
    if grid * grid != num_cells:
        raise InputError(f"{source} pos_emb_img.weight", [num_cells, dim], "is of no square grid of cells")
    if dim % heads:
        raise InputError(f"{source} stage2.hparams n_heads", heads, f"does not divide the width {dim}")
    notes, blocks = [], 1 + max(int(match[1]) for match in map(_BLOCK.fullmatch, weights) if match)
    _check_stated(hparams, {"embed_dim": dim, "n_layers": blocks, "ctx_len_img": num_cells}, source)
    _check_stated(stage, {"vocab_size_img": codes}, source)
    condition, tokens = _condition(weights, source)
    length = _shape(weights, "pos_emb_txt.weight", source)[0] if condition == "text" else 1
    if condition == "text":
        _check_stated(hparams, {"ctx_len_txt": length}, source)
        _check_stated(stage, {"vocab_size_txt": tokens}, source)
    dropout = hparams["resid_pdrop"]
    config = {
        "dim": dim, "num_layers": blocks, "num_heads": heads, "head_dim": dim // heads,
        "ff_mult": _shape(weights, "blocks.0.mlp.0.weight", source)[0] // dim,
        "attention_dropout": dropout if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0,
        "text_vocab_size": tokens, "text_seq_len": length, "text_position_rows": length,
        "image_vocab_size": codes, "image_grid_size": grid,
        "condition": condition, "bos": False, "image_positions": "learned", "layer_scale": False, "separate_heads": True,
        "qkv_bias": "blocks.0.attn.query.bias" in weights,
        "activation": "quick_gelu" if hparams["gelu_use_approx"] else "gelu",
    }  # fmt: skip
    ours = _renamed(weights, condition)
    missing = [
        f"layers.{layer}.{part}" for layer in range(blocks) for part in _BIASES if f"layers.{layer}.{part}" not in ours
    ]
    if missing:
        notes.append(f"{len(missing)} layers without a bias have one of zeros here, which training on can change")
        sizes = {part: ours[f"layers.0.{part.removesuffix('bias')}weight"].shape[:1] for part in _BIASES}
        ours |= {name: _zeros(sizes[name.split(".", 2)[2]]) for name in missing}
    return MindalleTransformer(parse_section(TransformerConfig, config, source=str(source)), ours, notes)


_BIASES = ("attention.out.bias", "feed_forward.grow.bias", "feed_forward.shrink.bias")


def _condition(weights: Weights, source: Path) -> tuple[str, int]:
    """What images are made of, and how many rows its table has."""
    if "tok_emb_txt.weight" in weights:
        return "text", _shape(weights, "tok_emb_txt.weight", source)[0]
    if "sos.weight" in weights:
        return "class", _shape(weights, "sos.weight", source)[0]
    _shape(weights, "sos", source)
    return "nothing", 1


def _renamed(weights: Weights, condition: str) -> Weights:
    """All tensors under our names; what is not known keeps its own, which the comparison of shapes names."""
    ours: Weights = {}
    left = dict(weights)
    for name in list(left):
        match = _BLOCK.fullmatch(name)
        if name in _TABLES:
            ours[_TABLES[name]] = left.pop(name)
        elif match and match[2] in _LEAVES:
            ours[f"layers.{match[1]}.{_LEAVES[match[2]]}"] = left.pop(name)
        elif match and match[2] in ("attn.query.weight", "attn.query.bias"):
            kind = match[2].rpartition(".")[2]
            parts = [f"blocks.{match[1]}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            if all(part in left for part in parts):
                ours[f"layers.{match[1]}.attention.qkv.{kind}"] = _joined([left.pop(part) for part in parts])
    if condition == "nothing" and "sos" in left:
        sos = left.pop("sos")
        ours["text_embedding.tokens"] = LazyTensor((1, sos.shape[-1]), sos.dtype, lambda: sos.read().flatten(0, -2))
    heads = ["head_txt.weight", "head_img.weight"] if condition == "text" else ["head.weight"]
    if all(head in left for head in heads):
        ours["head.weight"] = _joined([left.pop(head) for head in heads])
    return ours | left


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    """Tensors one after the other."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read() -> Tensor:  # one part in memory beside the whole
        whole = torch.empty(shape, dtype=parts[0].dtype, device="cpu")
        for rows, part in zip(whole.split([part.shape[0] for part in parts]), parts, strict=True):
            rows.copy_(part.read())
        return whole

    return LazyTensor(shape, parts[0].dtype, read)


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, torch.float32, lambda: torch.zeros(shape, dtype=torch.float32, device="cpu"))


def _check_stated(stated: Mapping[Any, Any], found: Mapping[str, int], source: Path) -> None:
    for key, value in found.items():
        if stated.get(key) is not None and stated[key] != value:
            raise InputError(
                f"{source} {key}", stated[key], f"its tensors say {value}: yaml and weights are of two models"
            )


def _shape(weights: Weights, name: str, source: Path) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"{source} {name}", "missing", "this kind of transformer has such a tensor")
    shape = weights[name].shape
    if name != "sos" and len(shape) != 2:
        raise InputError(f"{source} {name}", list(shape), "must have 2 dimensions")
    return shape


# --------------------------------------------------------------------------------------------------------- tokenizers


def mindalle_tokenizer(folder: Path, num_rows: int) -> CaptionTokenizer | None:
    """The tokenizer of a model's folder: byte pairs of lower-cased characters; None: its two files are not there.

    Args:
        num_rows: of the model's text table.

    Raises:
        InputError: files that are none, or of another model.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        vocabulary = [path for path in sorted(place.glob("*.json")) if _is_vocabulary(path)]
        merges = [path for path in sorted(place.glob("*.txt")) if path.stat().st_size <= _MAX_TOKENIZER_BYTES]
        if len(vocabulary) == 1 and len(merges) == 1:
            return _char_bpe(vocabulary[0], merges[0], num_rows)
    return None


def class_names(config: TransformerConfig) -> CaptionTokenizer:
    """The tokenizer of a model without text: classes by their numbers, which is all that its files say of them."""
    if config.condition == "nothing":
        return unconditional_tokenizer()
    return class_tokenizer(str(number) for number in range(config.text_vocab_size))


def _is_vocabulary(path: Path) -> bool:
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        return False
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and bool(tree) and all(type(value) is int for value in tree.values())


def _char_bpe(vocabulary: Path, merges: Path, num_rows: int) -> CaptionTokenizer:
    """`tokenizers.CharBPETokenizer(lowercase=True, unk_token="[UNK]")` with [PAD] added, as minDALL-E builds it."""
    entries = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()
    found = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in found):
        raise InputError("tokenizer", merges, "has a line that is no pair: copy it again")
    pairs = [(first, second) for first, second in found]
    if _UNKNOWN not in entries or len(set(entries.values())) < len(entries) or not min(entries.values()) >= 0:
        raise InputError("tokenizer", vocabulary, f"has an entry twice, or no {_UNKNOWN}: copy it again")
    if max(entries.values()) >= num_rows:
        raise InputError(
            "tokenizer", vocabulary, f"numbers entries up to {max(entries.values())}, its model has {num_rows}"
        )
    unknown = next((part for pair in pairs for part in (*pair, "".join(pair)) if part not in entries), None)
    if unknown is not None:
        raise InputError(
            "tokenizer", merges, f"joins {unknown[:40]!r}, which {vocabulary.name} does not have: copy both again"
        )
    model = models.BPE(entries, pairs, unk_token=_UNKNOWN, end_of_word_suffix=_WORD_END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(_WORD_END)
    tokenizer.add_special_tokens([AddedToken(_PADDING, special=True)])
    return CaptionTokenizer(tokenizer, SpecialTokens(unk_token=_UNKNOWN, pad_token=_PADDING))
