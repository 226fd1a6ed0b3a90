"""What readers take from a checkpoint's tree: state dicts, modules' tensors, plain configs."""

from collections.abc import Hashable, Mapping
from typing import Any

from engine.errors import InputError
from engine.interop.pickle_values import Record, StoredTensor
from engine.interop.torch_file import TorchFile, dtype_of
from engine.models.weight_file import LazyTensor

Weights = dict[str, LazyTensor]
_MOST_TENSORS = 100_000
_DEEPEST = 64


def state_dict(tree: Any, file: TorchFile) -> Weights:
    """The tensors of a flat dictionary of names; what is no tensor is left out."""
    if not isinstance(tree, dict):
        return {}
    return {str(name): lazy(value, file) for name, value in tree.items() if isinstance(value, StoredTensor)}


def lazy(tensor: StoredTensor, file: TorchFile) -> LazyTensor:
    """A tensor that is read from its file when it is written."""
    return LazyTensor(tensor.shape, dtype_of(tensor.storage, file.path), lambda: file.read(tensor))


def module_tensors(module: Record, file: TorchFile) -> Weights:
    """Parameters and buffers of a pickled module or a TorchScript one, under the names of its state dict.

    Raises:
        InputError: nested without end.
    """
    found: Weights = {}
    waiting: list[tuple[str, Record, int]] = [("", module, 0)]
    visited = 0
    while waiting:
        prefix, record, depth = waiting.pop()
        visited += 1 + len(waiting)
        if depth > _DEEPEST or len(found) > _MOST_TENSORS or visited > _MOST_TENSORS:
            raise InputError("checkpoint", file.path, "holds a module that is nested without end: it is refused")
        state = record.state if isinstance(record.state, dict) else {}
        groups: list[Any] = [state]  # TorchScript: attributes side by side
        if isinstance(state.get("_modules"), dict):
            unsaved = state.get("_non_persistent_buffers_set") or []
            buffers = {name: value for name, value in (state.get("_buffers") or {}).items() if name not in unsaved}
            groups = [state.get("_parameters") or {}, buffers, state["_modules"]]
        for group in groups:
            for name, value in group.items() if isinstance(group, dict) else ():
                if isinstance(value, StoredTensor):
                    found[f"{prefix}{name}"] = lazy(value, file)
                elif isinstance(value, Record) and isinstance(value.state, dict):
                    waiting.append((f"{prefix}{name}.", value, depth + 1))
    return found


def plain(tree: Any, *, keep_none_texts: bool = False) -> Any:
    """A config as dictionaries, lists and values: OmegaConf's nodes, namespaces and attribute dictionaries unwrapped.

    The texts "None" and "none", which yaml files of taming and KoDALLE have, are nothing unless they are kept. A tree without end, or one that shares its parts
    so often that it would not fit into memory, is nothing from there on.
    """
    return _Unwrapping(keep_none_texts).plain(tree, 0)


class _Unwrapping:
    def __init__(self, keep_none_texts: bool) -> None:
        self.keep_none_texts = keep_none_texts
        self.values = 0

    def plain(self, tree: Any, depth: int) -> Any:
        self.values += 1
        if depth > _DEEPEST or self.values > _MOST_TENSORS:
            return None
        if isinstance(tree, Record):
            state = tree.state if isinstance(tree.state, dict) else {}
            for content in ("_content", "_val"):
                if content in state:
                    return self.plain(state[content], depth + 1)
            return self.plain(tree.items or tree.elements or state, depth + 1)
        if isinstance(tree, dict):
            return {key: self.plain(value, depth + 1) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.plain(value, depth + 1) for value in tree]
        return None if tree in ("None", "none") and not self.keep_none_texts else tree


def check_shapes(found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]], source: Any) -> None:
    """Raises InputError: the first tensor that is missing, not known, or of another shape than `expected`, by name."""
    for name in sorted(expected.keys() | found.keys()):
        ours = list(expected[name]) if name in expected else None
        theirs = list(found[name].shape) if name in found else None
        if ours is None:
            raise InputError(f"{source} {name}", theirs, "is a tensor that this kind of model does not have")
        if theirs is None:
            raise InputError(f"{source} {name}", "missing", f"this kind of model has it, of shape {ours}")
        if ours != theirs:
            raise InputError(f"{source} {name}", theirs, f"the other tensors and the config require {ours}")


def number(tree: Mapping[Hashable, Any], key: str, source: Any) -> int:
    """A positive integer of a config.

    Raises:
        InputError: missing, or something else.
    """
    value = tree.get(key)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputError(f"{source} {key}", value, "must be a positive integer")
    return value
