"""Reader of Hugging Face folders of a `CLIPModel`: config.json, weights, tokenizer, preprocessing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config.ranker import ClipConfig
from engine.config.section import parse_section
from engine.data.tokenizer import CaptionTokenizer, load_tokenizer
from engine.errors import InputError
from engine.files import read_json
from engine.interop.checkpoint import open_checkpoint
from engine.interop.trees import Weights, number
from engine.models.weight_file import LazyTensor

_TEXT_DEFAULTS = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "eos_token_id": 49407, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32,
}  # fmt: skip
_COMPUTED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # buffers of older versions


@dataclass(frozen=True)
class ClipFolder:
    """What a folder holds."""

    config: ClipConfig
    weights: Weights
    notes: list[str]
    tokenizer: CaptionTokenizer


def is_clip_folder(folder: Path) -> bool:
    """Whether a folder's config.json is of a CLIPModel."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    tree = read_json(path, field="source", remedy="give a folder that transformers wrote")
    return isinstance(tree, dict) and tree.get("model_type") == "clip"


def read_clip_folder(folder: Path) -> ClipFolder:
    """Config, weights, notes and tokenizer.

    Raises:
        InputError: a file that is missing, sizes that are none, or a tokenizer with more entries than the table has rows.
    """
    tree = read_json(folder / "config.json", field="source", remedy="give a folder that transformers wrote")
    # Saved configs leave out what equals the defaults; the oldest have a second copy that wins.
    text = _TEXT_DEFAULTS | (tree.get("text_config") or {}) | (tree.get("text_config_dict") or {})
    vision = _VISION_DEFAULTS | (tree.get("vision_config") or {}) | (tree.get("vision_config_dict") or {})
    source = str(folder / "config.json")
    if text["hidden_act"] != vision["hidden_act"] or text["layer_norm_eps"] != vision["layer_norm_eps"]:
        raise InputError(f"{source} hidden_act", vision["hidden_act"], f"the text encoder has {text['hidden_act']}")
    config = {
        "image_size": number(vision, "image_size", source), "patch_size": number(vision, "patch_size", source),
        "image_dim": number(vision, "hidden_size", source), "image_layers": number(vision, "num_hidden_layers", source),
        "image_heads": number(vision, "num_attention_heads", source), "image_ff_dim": number(vision, "intermediate_size", source),
        "text_vocab_size": number(text, "vocab_size", source), "text_seq_len": number(text, "max_position_embeddings", source),
        "text_dim": number(text, "hidden_size", source), "text_layers": number(text, "num_hidden_layers", source),
        "text_heads": number(text, "num_attention_heads", source), "text_ff_dim": number(text, "intermediate_size", source),
        "end_token": number(text, "eos_token_id", source), "embed_dim": number({"projection_dim": 512} | tree, "projection_dim", source),
        "activation": text["hidden_act"], "layer_norm_eps": text["layer_norm_eps"],
    }  # fmt: skip
    config |= _preprocessing(folder)
    weights = _weights(folder)
    dropped = [name for name in _COMPUTED if name in weights]
    notes = [f"{len(dropped)} tensors without use left out (position numbers)"] if dropped else []
    tokenizer = load_tokenizer(str(folder))
    section: ClipConfig = parse_section(ClipConfig, config, source=source)
    if tokenizer.vocab_size > section.text_vocab_size:
        raise InputError(
            "source", folder, f"its tokenizer has {tokenizer.vocab_size} entries, its table {section.text_vocab_size} rows"
        )  # fmt: skip
    ours = {f"network.{name}": value for name, value in weights.items() if name not in dropped}
    return ClipFolder(section, ours, notes, tokenizer)


def _preprocessing(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    tree = read_json(path, field="source", remedy="mend it, or remove it")
    return {key: tree[key] for key in ("image_mean", "image_std") if key in tree}


def _weights(folder: Path) -> Weights:
    path = folder / "model.safetensors"
    if not path.is_file():
        older = folder / "pytorch_model.bin"
        if not older.is_file():
            raise InputError(
                "source", folder, "has neither model.safetensors nor pytorch_model.bin: copy the whole folder"
            )
        return open_checkpoint(older).weights
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError("source", path, f"cannot be read ({error}): copy the file again") from error
    unknown = {kind for _, kind in described.values()} - _DTYPES.keys()
    if unknown:
        raise InputError("source", path, f"holds numbers of type {min(unknown)}: save it as float32 first")
    return {
        name: LazyTensor(shape, _DTYPES[kind], _reader(path, name)) for name, (shape, kind) in described.items()
    }  # fmt: skip


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read
