"""What a file or a folder holds, by content: the layouts in which other projects save their models.

layout            tree of the file                                   written by
Lightning         {"state_dict": …, "callbacks": …}                  taming
train script      {"hparams": …, "weights": …}                       DALLE-pytorch `train_vae.py`, KoDALLE
state dict        {name: tensor}                                     `torch.save(model.state_dict())`
module            an object of a class                               `torch.save(model)`, `torch.jit.save(model)`
DeepSpeed         a folder of a file a rank                          engine.interop.deepspeed_folder
transformers      a folder with config.json and safetensors          engine.interop.clip_reader
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.config_files import load_yaml
from engine.errors import InputError
from engine.interop.pickle_values import Record
from engine.interop.torch_file import TorchFile, is_torch_file, open_torch_file
from engine.interop.trees import Weights, module_tensors, plain, state_dict

_MAX_YAML_BYTES = 1 << 20
_MAX_SIBLINGS = 1000  # files of a folder that are looked at


@dataclass(frozen=True)
class Checkpoint:
    """One model's tensors, not read yet, and what its file says about it.

    Attributes:
        weights: under the names of the module's state dict.
        hparams: what the train script made it with; empty where the layout has none. The text 'None' stays a text: in
            KoDALLE's it switched options on.
        codec_hparams: the same of the codec inside a transformer's checkpoint.
        version: of the library that wrote it, where it says so.
        module: the pickled module itself, for what its tensors do not show.
    """

    path: Path
    weights: Weights
    hparams: dict[Any, Any] = field(default_factory=dict)
    codec_hparams: dict[Any, Any] = field(default_factory=dict)
    module: Record | None = None
    version: str | None = None

    @property
    def names(self) -> set[str]:
        return set(self.weights)


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of torch.save or torch.jit.save.

    Raises:
        InputError: none of the layouts above, or a file that is broken or asks for code to be run.
    """
    if not is_torch_file(path):
        raise InputError("checkpoint", path, "is no file of torch.save: give a .pt, .ckpt or .pkl file, or its folder")
    return checkpoint_of(open_torch_file(path))


def checkpoint_of(file: TorchFile) -> Checkpoint:
    """The model of an opened file. Same errors."""
    tree = file.tree
    if isinstance(tree, Record):
        weights = module_tensors(tree, file)
        if not weights:
            raise InputError("checkpoint", file.path, f"is a pickled {tree.kind} without tensors")
        return Checkpoint(file.path, weights, module=tree)
    if not isinstance(tree, dict):
        raise InputError("checkpoint", file.path, f"holds a {type(tree).__name__}, not a model")
    hparams, codec_hparams = (settings_of(tree, key) for key in ("hparams", "vae_params"))
    if isinstance(tree.get("weights"), str):
        raise InputError(
            "checkpoint", file.path,
            "is the auxiliary file of a DeepSpeed checkpoint, which has settings and no weights: give the folder that "
            "it is in, with the global_step folder that DeepSpeed wrote"
        )  # fmt: skip
    for key in ("state_dict", "weights", "module"):
        if isinstance(tree.get(key), dict):
            version = str(tree["version"])[:40] if isinstance(tree.get("version"), str) else None
            return Checkpoint(file.path, state_dict(tree[key], file), hparams, codec_hparams, version=version)
    weights = state_dict(tree, file)
    if not weights:
        keys = ", ".join(sorted(str(key)[:40] for key in tree)[:8])
        raise InputError("checkpoint", file.path, f"has no weights in it, only {keys or 'nothing'}")
    return Checkpoint(file.path, weights, hparams)


def settings_of(tree: dict[Any, Any], key: str) -> dict[Any, Any]:
    """A dictionary of settings in a checkpoint's tree, as it was written; empty: there is none."""
    found = plain(tree.get(key), keep_none_texts=True)
    return found if isinstance(found, dict) else {}


def torch_files(folder: Path) -> list[Path]:
    """The files of torch.save that a folder holds, by content, sorted by name."""
    return [path for path in _files(folder) if is_torch_file(path)]


def taming_config(checkpoint: Path, config: Path | None) -> dict[Any, Any]:
    """`model.params` of the yaml that belongs to a taming checkpoint; empty where there is none.

    Args:
        config: the yaml; None: looked for beside the checkpoint, and in the folder `configs` beside its folder, where
            taming's training writes it.

    Raises:
        InputError: `config` is no taming yaml, or several files could be meant.
    """
    if config is not None:
        params = _taming_params(config)
        if params is None:
            raise InputError("--config", config, "has no model.params.ddconfig: give the yaml of a taming model")
        return params
    found: dict[Path, dict[Any, Any]] = {}
    for folder in (checkpoint.parent, checkpoint.parent.parent / "configs"):
        for path in _files(folder):
            params = _taming_params(path) if path.suffix.lower() in (".yaml", ".yml") else None
            if params is not None:
                found[path] = params
    same_name = [path for path in found if path.stem == checkpoint.stem]
    if len(found) > 1 and len(same_name) != 1:
        names = ", ".join(path.name for path in sorted(found)[:5])
        raise InputError("checkpoint", checkpoint, f"has several yaml files near it ({names}): give one with --config")
    return found[same_name[0]] if same_name else next(iter(found.values()), {})


def _taming_params(path: Path) -> dict[Any, Any] | None:
    """`model.params` with a ddconfig; None: another file. The texts 'None' are nothing, as everywhere."""
    tree = _yaml_tree(path)
    for key in ("model", "params"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) and isinstance(tree.get("ddconfig"), dict) else None


def yaml_trees(places: list[Path] | Path) -> list[tuple[Path, Any]]:
    """The yaml files of folders, or one file, as plain values; what is none is left out."""
    paths = [places] if isinstance(places, Path) else [path for folder in places for path in _files(folder)]
    found = [(path, _yaml_tree(path)) for path in paths if path.suffix.lower() in (".yaml", ".yml") or path == places]
    return [(path, tree) for path, tree in found if tree is not None]


def _yaml_tree(path: Path) -> Any:
    """None: too large, or no yaml."""
    if path.stat().st_size > _MAX_YAML_BYTES:
        return None
    try:
        return plain(load_yaml(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in list(folder.iterdir())[:_MAX_SIBLINGS] if path.is_file())
