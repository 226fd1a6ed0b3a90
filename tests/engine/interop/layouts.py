"""Small checkpoints in other projects' layouts, made without these projects.

A module that is pickled whole names its class by module and name; `module_of` makes one of any name around given tensors, as
`torch.save(model)` of the original would store them.
"""

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def module_of(tensors: dict[str, Tensor], module: str, name: str, **attributes: Any) -> nn.Module:
    """An nn.Module of class `module.name` whose state dict is `tensors`; its parts are of classes of the same module."""
    kind = type(name, (nn.Module,), {"__module__": module, "__qualname__": name})
    root: nn.Module = kind()
    for path, tensor in tensors.items():
        *parents, leaf = path.split(".")
        owner = root
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            child = owner._modules[parent]
            assert child is not None
            owner = child
        if tensor.is_floating_point() and "running" not in leaf:
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
    for key, value in attributes.items():
        setattr(root, key, value)
    return root


@contextmanager
def importable(*objects: Any) -> Iterator[None]:
    """Makes the classes of objects picklable under the names that they state; afterwards these names mean what they did."""
    added: list[str] = []
    replaced: list[tuple[types.ModuleType, str, Any]] = []
    for item in objects:
        kind = item if isinstance(item, type) else type(item)
        path = ""
        for part in kind.__module__.split("."):
            path = f"{path}.{part}".lstrip(".")
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                added.append(path)
        owner = sys.modules[kind.__module__]
        replaced.append((owner, kind.__name__, vars(owner).get(kind.__name__)))
        setattr(owner, kind.__name__, kind)
    try:
        yield
    finally:
        for owner, name, before in reversed(replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for path in added:
            del sys.modules[path]


def save_module(tensors: dict[str, Tensor], path: Path, module: str, name: str, *, zipped: bool = True) -> None:
    """`torch.save(model, path)` of a model of class `module.name` with these tensors."""
    model = module_of(tensors, module, name)
    with importable(model):
        torch.save(model, path, _use_new_zipfile_serialization=zipped)


def save_lightning(tensors: dict[str, Tensor], path: Path) -> None:
    """A checkpoint of Lightning 1.0, which has the classes of its callbacks as keys, with the loss's tensors."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    losses = {f"loss.discriminator.main.{number}.weight": torch.zeros(1).expand(4, 4) for number in range(2)}
    with importable(callback):
        content = {
            "epoch": 3,
            "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
            "state_dict": tensors | losses,
        }
        torch.save(content, path)


def timm_names(tensors: dict[str, Tensor], blocks: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A KoCLIP of ours under the names of KoDALLE's `clipmodel`, whose EfficientNet is timm's.

    Args:
        blocks: stage and number in it of each block in turn.
    """
    return {_timm_name(name, blocks): value for name, value in tensors.items()} | {
        "text_encoder.model.embeddings.position_ids": torch.arange(40)[None]
    }


def _timm_name(name: str, blocks: list[tuple[int, int]]) -> str:
    if name.startswith("text_encoder."):
        return name.replace("text_encoder.", "text_encoder.model.", 1)
    if not name.startswith("image_encoder."):
        return name
    name = name.removeprefix("image_encoder.")
    for ours, theirs in (
        ("embeddings.convolution", "conv_stem"), ("embeddings.batchnorm", "bn1"),
        ("encoder.top_conv", "conv_head"), ("encoder.top_bn", "bn2"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        stage, number = blocks[int(block[1])]
        depthwise, projection = ("bn2", ("conv_pwl", "bn3")) if stage else ("bn1", ("conv_pw", "bn2"))
        for ours, theirs in (
            ("expansion.expand_conv", "conv_pw"), ("expansion.expand_bn", "bn1"),
            ("depthwise_conv.depthwise_conv", "conv_dw"), ("depthwise_conv.depthwise_norm", depthwise),
            ("squeeze_excite.reduce", "se.conv_reduce"), ("squeeze_excite.expand", "se.conv_expand"),
            ("projection.project_conv", projection[0]), ("projection.project_bn", projection[1]),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        name = name.replace(block[0], f"blocks.{stage}.{number}.")
    return f"image_encoder.model.{name}"
