"""DeepSpeed checkpoints: a folder with a file a rank, put together to one state dict.

    latest                                    the name of the step's folder
    auxiliary.pt                              DALLE-pytorch's settings, without weights
    <step>/mp_rank_00_model_states.pt         `module`: all weights (ZeRO 0 to 2), in the training's 16 or 32 bits
    <step>/*zero_pp_rank_<r>_*_optim_states.pt    the 32-bit weights of rank r's share (ZeRO 1 to 3)
    <step>/zero_pp_rank_<r>_*_model_states.pt     ZeRO 3: `module` holds no numbers, `param_shapes` the names

The 32-bit weights are laid side by side in groups of parameters: ZeRO 1 and 2 cut each group, ZeRO 3 each parameter, into a part
a rank. They are taken where there are any, as DeepSpeed's own `zero_to_fp32.py` does, but read a tensor at a time.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.interop.checkpoint import Checkpoint, settings_of, torch_files
from engine.interop.pickle_values import StoredTensor
from engine.interop.torch_file import TorchFile, dtype_of, open_torch_file
from engine.interop.trees import Weights, state_dict
from engine.models.weight_file import LazyTensor

_Piece = tuple[TorchFile, StoredTensor]  # a rank's part of a group


def is_deepspeed_folder(folder: Path) -> bool:
    """Whether DeepSpeed wrote a folder, or the folder of one step in it."""
    return (folder / "latest").is_file() or bool(_model_files(folder))


def open_deepspeed_folder(folder: Path) -> Checkpoint:
    """The weights of the newest step, and the settings beside it.

    Raises:
        InputError: the step's folder is missing, a rank's file is, or the parts make no whole.
    """
    step, settings = folder, folder.parent
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[\w.-]+", tag) or tag in (".", ".."):
            raise InputError(
                "DeepSpeed folder", folder, f"its file `latest` names {tag[:60]!r}, which is no folder's name"
            )
        step, settings = folder / tag, folder
        if not step.is_dir():
            raise InputError(
                "DeepSpeed folder", folder, f"lacks the folder {tag}, which holds the weights: what is here are settings"
            )  # fmt: skip
    model_files = [open_torch_file(path) for path in _model_files(step)]
    if not model_files:
        raise InputError("DeepSpeed folder", step, "holds no *_model_states.pt: copy the whole folder")
    main = model_files[0]
    if not isinstance(main.tree, dict) or not isinstance(main.tree.get("module"), dict):
        raise InputError("DeepSpeed folder", main.path, "has no `module` in it")
    weights = state_dict(main.tree["module"], main)
    weights |= _float_weights(main, [open_torch_file(path) for path in _optimiser_files(step)], model_files)
    return Checkpoint(step, weights, *_settings(settings))


def _settings(folder: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """`hparams` of the model and of its codec, as the train script's auxiliary file has them."""
    for path in torch_files(folder):
        tree = open_torch_file(path).tree
        if isinstance(tree, dict) and "hparams" in tree:
            return settings_of(tree, "hparams"), settings_of(tree, "vae_params")
    return {}, {}


def _model_files(step: Path) -> list[Path]:
    return sorted(step.glob("*_model_states.pt"), key=_rank)


def _optimiser_files(step: Path) -> list[Path]:
    return sorted(step.glob("*_optim_states.pt"), key=_rank)


def _rank(path: Path) -> int:
    """Of data parallelism; files of model parallelism are not written by the projects that are read here."""
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def _float_weights(main: TorchFile, optimisers: list[TorchFile], models: list[TorchFile]) -> Weights:
    """32-bit weights of the trained parameters; empty without ZeRO."""
    states: list[Any] = [
        file.tree.get("optimizer_state_dict") if isinstance(file.tree, dict) else None for file in optimisers
    ]
    if not states or not all(isinstance(state, dict) and "zero_stage" in state for state in states):
        return {}
    stage = states[0]["zero_stage"]
    count = states[0].get("partition_count", len(states))
    ranks = max(count) if isinstance(count, list) else count
    if ranks != len(states):
        raise InputError(
            "DeepSpeed folder", main.path.parent, f"holds {len(states)} of the {ranks} ranks' files: copy all"
        )
    groups = main.tree.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise InputError("DeepSpeed folder", main.path, "has no list of its parameters' shapes (DeepSpeed before 0.5?)")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    parts: list[list[_Piece]] = []  # of each rank, of each group
    for file, state in zip(optimisers, states, strict=True):
        flat = state.get(key)
        if not isinstance(flat, list) or not all(isinstance(part, StoredTensor) for part in flat):
            raise InputError("DeepSpeed folder", file.path, f"has no {key}")
        parts.append([(file, part) for part in flat])
    if stage == 3:
        return _stage_3(main, groups, parts) | _frozen(models)
    if any(len(rank) != len(groups) for rank in parts):
        raise InputError("DeepSpeed folder", main.path, f"its ranks have not the {len(groups)} groups of parameters")
    weights: Weights = {}
    for number, group in enumerate(groups):
        pieces, offset = [rank[number] for rank in parts], 0
        for name, shape in _shapes(group, main):
            weights[name] = _joined(pieces, offset, shape, main)
            offset += math.prod(shape)
    return weights


def _stage_3(main: TorchFile, groups: list[Any], parts: list[list[_Piece]]) -> Weights:
    """Each parameter is cut into as many equal parts as there are ranks, the last one padded."""
    weights: Weights = {}
    ranks, offset = len(parts), 0
    for group in groups:
        for name, shape in _shapes(group, main):
            share = -(-math.prod(shape) // ranks)
            pieces = [_cut(rank, offset, share, main) for rank in parts]
            weights[name] = _joined([piece for rank in pieces for piece in rank], 0, shape, main)
            offset += share
    return weights


def _frozen(models: list[TorchFile]) -> Weights:
    """ZeRO 3: parameters that are not trained, a fragment a rank."""
    shapes = models[0].tree.get("frozen_param_shapes") or {}
    fragments = [file.tree.get("frozen_param_fragments") or {} for file in models]
    weights: Weights = {}
    for name, shape in _shapes(shapes, models[0]):
        pieces = [(file, part[name]) for file, part in zip(models, fragments, strict=True) if name in part]
        weights[name] = _joined(pieces, 0, shape, models[0])
    return weights


def _shapes(group: Mapping[Any, Any], main: TorchFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in group.items():
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise InputError("DeepSpeed folder", main.path, f"says of {str(name)[:80]} no shape")
        yield str(name), shape


def _cut(parts: list[_Piece], offset: int, count: int, main: TorchFile) -> list[_Piece]:
    """`count` numbers from `offset` on, of flat tensors that are laid end to end."""
    found: list[_Piece] = []
    for file, part in parts:
        if len(part.shape) != 1:
            raise InputError("DeepSpeed folder", file.path, "its weights are not in one row")
        taken = min(count, part.numel - offset)
        if taken > 0 and offset < part.numel:
            found.append((file, StoredTensor(part.storage, part.offset + offset, (taken,), (1,))))
            count -= taken
        offset = max(0, offset - part.numel)
    if count > 0:
        raise InputError("DeepSpeed folder", main.path.parent, f"its ranks' parts end {count:,} numbers too early")
    return found


def _joined(pieces: list[_Piece], offset: int, shape: tuple[int, ...], main: TorchFile) -> LazyTensor:
    cut = _cut(pieces, offset, math.prod(shape), main)
    dtype = dtype_of(pieces[0][1].storage, main.path) if pieces else torch.float32

    def read() -> Tensor:
        if not cut:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.cat([file.read(part) for file, part in cut]).view(shape)

    return LazyTensor(shape, dtype, read)
