"""What a model folder holds, in memory: loaded with a check that its parts fit each other, and saved again."""

from pathlib import Path
from typing import TypedDict

import torch

from engine.config.generation import GenerationConfig
from engine.data.caption_guide import CaptionGuide, read_guide
from engine.data.tokenizer import CaptionTokenizer, check_padding
from engine.device import default_dtype
from engine.errors import InputError
from engine.models.folder import (
    Part,
    load_folder_tokenizer,
    load_own_ranker_tokenizer,
    load_part,
    own_real_scores,
    write_model_folder,
)
from engine.models.folder_config import PartName, has_part, read_generation, read_ground
from engine.models.image_codec import ImageCodec
from engine.models.ranker import Ranker
from engine.models.real_scores import RealScores
from engine.models.transformer import KoDalle


class FolderContents(TypedDict):
    """The contents of a model folder: networks, tokenizers, and what says how they are used."""

    transformer: KoDalle
    vqgan: ImageCodec
    koclip: Ranker | None  # None: the folder has none
    tokenizer: CaptionTokenizer
    ranker_tokenizer: CaptionTokenizer | None  # None: the ranker reads captions with `tokenizer`
    card: str
    generation: GenerationConfig
    caption_guide: CaptionGuide
    real_scores: RealScores | None
    ground: str | None


def load_contents(folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> FolderContents:
    """The contents of a folder, the networks on `device`.

    Args:
        dtype: the transformer's; None: what suits the machine (engine.device). On a GPU the codec's and the ranker's too;
            on a CPU those are float32.

    Raises:
        InputError: a part that is missing, or weights that do not fit, each by name.
    """
    transformer, vqgan, koclip = _load_networks(folder, device=device, dtype=dtype)
    tokenizer = load_folder_tokenizer(folder)
    check_padding(tokenizer, transformer.config, field="model folder", value=folder)
    card = folder / "model_card.md"
    return FolderContents(
        transformer=transformer,
        vqgan=vqgan,
        koclip=koclip,
        tokenizer=tokenizer,
        ranker_tokenizer=load_own_ranker_tokenizer(folder),
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
        generation=read_generation(folder),
        caption_guide=read_guide(folder),
        real_scores=own_real_scores(folder),
        ground=read_ground(folder),
    )


def save_contents(folder: Path, contents: FolderContents, *, dtype: torch.dtype | None) -> None:
    """Writes a folder that `load_contents` reads.

    Args:
        dtype: floating-point weights are stored in it (None: as they are).

    Raises:
        InputError: `folder` holds anything but a model.
    """
    vqgan, transformer, koclip = contents["vqgan"], contents["transformer"], contents["koclip"]
    parts: dict[PartName, Part] = {
        "vqgan": Part(vqgan.config, vqgan.state_dict()),
        "transformer": Part(transformer.config, transformer.state_dict()),
    }
    if koclip is not None:
        parts["koclip"] = Part(koclip.config, koclip.state_dict())
    write_model_folder(
        folder,
        parts,
        card=contents["card"],
        tokenizer=contents["tokenizer"],
        ranker_tokenizer=contents["ranker_tokenizer"],
        generation=contents["generation"],
        caption_guide=contents["caption_guide"],
        real_scores=contents["real_scores"],
        ground=contents["ground"],
        dtype=dtype,
    )


def _load_networks(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None
) -> tuple[KoDalle, ImageCodec, Ranker | None]:
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
