"""Loading of a model folder, or of the copy of a Hugging Face model on this disk, with a check that its parts fit."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.device import default_dtype
from engine.errors import InputError
from engine.files import is_hub_name
from engine.models.folder import has_part, load_part
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.models.transformer import KoDalle


def local_folder(folder_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A model folder as it was named, or the hub's copy of `owner/name` on this disk.

    Raises:
        InputError: the hub has no such model or cannot be reached.
    """
    folder = Path(folder_or_hub_id)
    name = str(folder_or_hub_id)
    if folder.exists() or not is_hub_name(name):
        return folder  # a folder that is missing gets its own error message
    try:
        fetched = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[
                "*.json",
                "*.safetensors",
                "SHA256SUMS",
                "*.txt",
                "*.md",
                "*.onnx",
            ],  # never pickles or code
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError("model", name, f"no such folder, and it cannot be fetched from the hub ({reason})") from error
    return Path(fetched)


def load_models(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None
) -> tuple[KoDalle, ImageCodec, Ranker | None]:
    """Transformer, codec and ranker (None: the folder has none) of a model folder, on `device`.

    Args:
        dtype: the transformer's; None: what suits the machine (engine.device). On a GPU the codec's and the ranker's too;
            on a CPU those are float32.

    Raises:
        InputError: a part that is missing, or weights that do not fit, each by name.
    """
    transformer: KoDalle = load_part(folder, "transformer")
    vqgan: ImageCodec = load_part(folder, "vqgan")
    koclip: Ranker | None = load_part(folder, "koclip") if has_part(folder, "koclip") else None
    _check_fit(transformer, vqgan, folder)
    dtype = dtype or default_dtype(device, sum(parameter.numel() for parameter in transformer.parameters()))
    transformer.to(device=device, dtype=dtype)
    codec_dtype = torch.float32 if device.type == "cpu" else dtype
    for module in (vqgan, koclip):
        if module is not None:
            module.to(device=device, dtype=codec_dtype)
    return transformer, vqgan, koclip


def _check_fit(transformer: KoDalle, vqgan: ImageCodec, folder: Path) -> None:
    """Raises InputError: a transformer of other image tokens than the VQGAN's."""
    ours, theirs = transformer.config, vqgan.config
    if (ours.image_vocab_size, ours.image_grid_size) != (theirs.codebook_size, theirs.grid_size):
        raise InputError(
            "model folder",
            folder,
            f"the transformer has {ours.image_grid_size}x{ours.image_grid_size} of {ours.image_vocab_size} tokens, the "
            f"codec {theirs.grid_size}x{theirs.grid_size} of {theirs.codebook_size}: they are of two models",
        )
