"""Training on from a trained model: which sizes must agree, and how weights go into tables that have grown.

A text vocabulary may grow, for words that the first training never saw: old rows keep their values, new ones stay as they were
initialised. Images may have another size where convolutions alone see them. A model of captions may become one of classes, or of
nothing but images: what read the text is new then, and the rest is taken. Everything else must have the sizes of the model that it
starts from.

V text token table, T text positions, N image token table, C width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.config.section import Section
from engine.config.transformer import TransformerConfig
from engine.config_folders import different_sizes
from engine.errors import InputError
from engine.models.folder import read_part
from engine.models.folder_config import PartName, part_config


class Rows(NamedTuple):
    """Rows of a tensor that are copied: `number` of them, from `old` on in the trained one to `new` on in the new one."""

    new: int
    old: int
    number: int


def start_from(module: nn.Module, config: Section, folder: Path, part: PartName) -> None:
    """Copies the weights of one part of a model folder into `module`.

    Raises:
        InputError: the folder has no such part, or sizes that differ, all of them by name.
    """
    found = part_config(folder, part)
    different = different_sizes(config, found.model_dump())
    if different:
        raise InputError("start_from", folder, f"has other sizes ({'; '.join(different)}): write its sizes")
    weights = read_part(folder, part).weights
    with torch.no_grad():
        own = module.state_dict()
        blocks = _grown_rows(config, found, part)
        for name, tensor in own.items():
            rows = blocks.get(name)
            if rows is None or rows:
                _copy(tensor, weights[name], rows)


def _grown_rows(config: Section, found: Section, part: PartName) -> dict[str, Sequence[Rows]]:
    """The tensors that have a row for each text token, and where their rows go; nowhere: they start anew."""
    if part == "vqgan":
        return {}
    new, old = config.model_dump()["text_vocab_size"], found.model_dump()["text_vocab_size"]
    if part == "koclip":
        return {"text_encoder.embeddings.word_embeddings.weight": [Rows(0, 0, old)]}
    assert isinstance(config, TransformerConfig), type(config)
    assert isinstance(found, TransformerConfig), type(found)
    if config.condition != found.condition:  # nothing of the text, and the head's rows of images
        images = [Rows(config.text_head_rows, found.text_head_rows, config.image_vocab_size)]
        return {
            "text_embedding.tokens": [],
            "text_embedding.projection": [],
            "head.weight": images,
            "head.bias": images,
        }
    if config.condition != "text":
        return {}
    rest = found.joint_vocab_size - old  # reserved rows and image rows lie behind the text rows
    joint = [Rows(0, 0, old), Rows(new, old, rest)]
    return {"text_embedding.tokens": [Rows(0, 0, old)], "head.weight": joint, "head.bias": joint}


def _copy(target: Tensor, source: Tensor, rows: Sequence[Rows] | None) -> None:
    if rows is None:
        target.copy_(source)
        return
    for new, old, number in rows:
        target[new : new + number] = source[old : old + number]
