"""A CLIP by path, for the CLIP score or to guide a refinement: a folder that transformers wrote, or a model folder with a ranker."""

import hashlib
import json
from pathlib import Path

import torch

from engine.data.caption_grammar import CaptionGrammar
from engine.data.tokenizer import CaptionTokenizer
from engine.errors import InputError
from engine.files import file_digest
from engine.interop.clip_reader import is_clip_folder, read_clip_folder
from engine.interop.trees import check_shapes
from engine.metrics.clip_score import ClipScorer
from engine.models.clip import Clip
from engine.models.folder import load_part, load_ranker_tokenizer
from engine.models.folder_config import has_part, weights_digest
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker
from engine.models.uninitialised import Uninitialised

_FIELD = "--clip"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def open_clip_scorer(folder: Path, device: torch.device, *, english: CaptionGrammar | None = None) -> ClipScorer:
    """The scorer of a folder, on a device.

    Args:
        english: captions are read in its English.

    Raises:
        InputError: neither kind of folder, tensors that are missing, not known or of another shape, by name, or a KoCLIP whose scores
            are no cosines.
    """
    network, tokenizer, weights = open_ranker(folder, field=_FIELD)
    if isinstance(network, KoClip) and network.config.similarity != "cosine":
        raise InputError(_FIELD, folder, "scores by KoDALLE's products, which are no cosines: give another")
    network = network.eval().requires_grad_(False).to(device)
    return ClipScorer(network, tokenizer, folder.resolve().name, weights, english)


def open_ranker(folder: Path, *, field: str) -> tuple[Ranker, CaptionTokenizer, str]:
    """A ranker on the CPU, its tokenizer, and the digest of its weights.

    Raises:
        InputError: neither kind of folder, or tensors that are missing, not known or of another shape, by name.
    """
    if is_clip_folder(folder):
        return _of_transformers(folder)
    if (folder / "config.json").is_file() and has_part(folder, "koclip"):
        return load_part(folder, "koclip"), load_ranker_tokenizer(folder), weights_digest(folder, "koclip")
    raise InputError(field, folder, "holds no CLIP: give a folder of transformers' CLIPModel, or a model folder")


def _of_transformers(folder: Path) -> tuple[Clip, CaptionTokenizer, str]:
    found = read_clip_folder(folder)
    with torch.device("cpu"), Uninitialised():
        network = Clip(found.config)
    check_shapes(found.weights, {name: tuple(value.shape) for name, value in network.state_dict().items()}, folder)
    network.load_state_dict({name: value.to(torch.float32).read() for name, value in found.weights.items()})
    digest = hashlib.sha256(json.dumps(found.config.model_dump(mode="json"), sort_keys=True).encode())
    weight_file = next(folder / name for name in _WEIGHT_FILES if (folder / name).is_file())
    digest.update(file_digest(weight_file).sha256.encode())
    return network, found.tokenizer, digest.hexdigest()[:16]
