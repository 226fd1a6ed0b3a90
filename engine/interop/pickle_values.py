"""The inert values that a pickle stands for, and which names and calls in one stand for them.

    a class of a known library        -> `Name`;  an object of it  -> `Record` with its arguments, items and state
    torch's tensors and storages      -> `StoredTensor`, which says where its numbers are
    everything else that is called    -> UnsafePickle, with the name

So whole modules (KoCLIP's clip.pt, OpenAI's encoder.pkl), Lightning's callbacks and OmegaConf's nodes are read without the
libraries that wrote them, and a file that names `os.system` is refused where it does. engine/interop/pickle_machine.py reads
pickles to these values.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

_RECORD_PACKAGES = frozenset(
    [
        "torch.nn",
        "torch.optim",
        "torch.jit",
        "__torch__",
        "timm",
        "transformers",
        "clipmodel",
        "clip_model",
        "dall_e",
        "dalle_pytorch",
        "taming",
        "dalle",
        "pytorch_lightning",
        "lightning",
        "lightning_fabric",
        "omegaconf",
        "axial_positional_embedding",
        "rotary_embedding_torch",
        "deepspeed",
        "numpy",
        "typing",
        "pathlib",
        "argparse",
        "easydict",
        "attr",
        "__main__",
    ]
)
# Functions that the pickles of those libraries call to build values: kept as records of their arguments.
_RECORDED_CALLS = frozenset({
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.dtype", "_codecs.encode", "torch._utils._rebuild_device_tensor_from_numpy",
    "torch.jit._pickle.build_intlist", "torch.jit._pickle.build_doublelist", "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist", "torch.jit._pickle.restore_type_tag",
})  # fmt: skip
_PLAIN_NAMES = frozenset(
    [
        "set",
        "frozenset",
        "dict",
        "list",
        "tuple",
        "int",
        "float",
        "str",
        "bool",
        "bytes",
        "object",
        "complex",
        "slice",
        "bytearray",
        "NoneType",
    ]
)
_DTYPE_NAMES = frozenset(
    [
        "float16",
        "float32",
        "float64",
        "bfloat16",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
        "half",
        "float",
        "double",
        "long",
    ]
)
_TENSORS = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"})
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})


class UnsafePickle(ValueError):
    """What a pickle holds that is not read: a call, an opcode, or more of something than a checkpoint has."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle refers to, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that is not built: what its pickle would have given it."""

    kind: Name
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Hashable, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Numbers of one type in a row, outside the pickle. `kind` is torch's, as FloatStorage."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def checked_name(module: str, name: str) -> Name:
    """Raises UnsafePickle: a name outside the libraries whose records are read."""
    found = Name({"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module), name)
    in_package = any(found.module == package or found.module.startswith(f"{package}.") for package in _RECORD_PACKAGES)
    known = (
        in_package
        or (found.module == "builtins" and name in _PLAIN_NAMES)
        or (found.module == "collections" and name in ("OrderedDict", "defaultdict", "Counter"))
        or str(found) in _TENSORS | _PARAMETERS | _RECORDED_CALLS | {"copyreg._reconstructor"}
        or (
            found.module in ("torch", "torch.storage")
            and (name.endswith("Storage") or name in ("Size", "device", "dtype") or name in _DTYPE_NAMES)
        )
    )
    if not known or ("." in name and not in_package):
        raise UnsafePickle(f"names {found}, which no checkpoint needs")
    return found


def called(function: Any, arguments: Any, *, count_copied: Callable[[int], None]) -> Any:
    """What calling `function` stands for; only tensors, plain containers and objects of known classes do.

    Args:
        count_copied: called with the length of what is copied, before it is.

    Raises:
        UnsafePickle: any other call.
    """
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise UnsafePickle("calls something that is not a name")
    name = str(function)
    if name in _TENSORS:
        return _tensor(*arguments[:4])
    if name in _PARAMETERS:
        if not isinstance(arguments[0], StoredTensor):
            raise UnsafePickle("has a parameter without a tensor")
        return arguments[0]
    if name in ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"):
        pairs = [] if name == "collections.defaultdict" or not arguments else arguments[0]
        count_copied(len(pairs))
        return dict(pairs) if isinstance(pairs, dict) else {plain_key(key): value for key, value in pairs}
    if name in ("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "torch.Size"):
        count_copied(len(arguments[0]) if arguments else 0)
        elements = list(arguments[0]) if arguments else []
        return tuple(elements) if name in ("builtins.tuple", "torch.Size") else elements
    if name == "torch.device":
        return str(arguments[0])
    if name == "copyreg._reconstructor" and isinstance(arguments[0], Name):
        return Record(arguments[0])
    # Classes are capitalised in every library above: a function is not even recorded.
    is_class = function.name.rpartition(".")[2].lstrip("_")[:1].isupper() and not function.module.startswith(
        "torch.storage"
    )
    if name in _RECORDED_CALLS or (is_class and function.module.partition(".")[0] not in ("builtins", "collections")):
        return Record(function, arguments)
    raise UnsafePickle(f"calls {function}")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    shape, strides = tuple(shape), tuple(strides)
    whole = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 8:
        raise UnsafePickle("has a tensor without a storage")
    if any(type(number) is not int or not 0 <= number < 1 << 40 for number in whole):
        raise UnsafePickle("has a tensor with an impossible size")
    furthest = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and furthest >= storage.numel:
        raise UnsafePickle(
            f"has a tensor of shape {list(shape)} that ends outside its storage of {storage.numel:,} numbers"
        )
    return StoredTensor(storage, offset, shape, strides)


def plain_key(key: Any) -> Hashable:
    """Only plain keys: hashing nested ones recurses as deep as the file likes."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(not isinstance(part, str | int | float | bool | bytes | Name | None) for part in parts):
        raise UnsafePickle(f"has a key of type {type(key).__name__}")
    return key
