"""Loading of a model folder's networks, with a check that they fit."""

from pathlib import Path

import torch

from engine.device import default_dtype
from engine.errors import InputError
from engine.models.folder import load_part
from engine.models.folder_config import has_part
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.models.transformer import KoDalle


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
