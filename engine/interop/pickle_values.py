"""Pickles as inert values: what a checkpoint says, without building what it asks for.

The standard library's `pickletools` splits a pickle into opcodes and their arguments; the interpreter below puts them
together as dictionaries, lists and two kinds of records. It never imports a module and never calls anything that a file names:

    a class of a known library        -> `Name`;  an object of it  -> `Record` with its arguments, items and state
    torch's tensors and storages      -> `StoredTensor`, which says where its numbers are
    everything else that is called    -> UnsafePickle, with the name

So whole modules (KoCLIP's clip.pt, OpenAI's encoder.pkl), Lightning's callbacks and OmegaConf's nodes are read without the
libraries that wrote them, and a file that names `os.system` is refused where it does.
"""

import io
import math
import pickletools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE_BYTES = 16 << 20  # tensors are stored outside; a 64-layer DALLE with its optimiser has 1 MB
MAX_OPCODES = 500_000  # an opcode of one byte can make an object of a hundred
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


def read_pickle(data: bytes) -> tuple[Any, int]:
    """The value of the pickle that `data` begins with, and its length in bytes.

    Raises:
        UnsafePickle: it asks for a call, is longer or larger than a checkpoint's, or is no pickle.
    """
    window = data[: MAX_PICKLE_BYTES + 1]
    machine = _Machine()
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(window))):
            if number >= MAX_OPCODES:
                raise UnsafePickle(f"has more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop(), (position or 0) + 1
            machine.run(opcode.name, argument)
    except UnsafePickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UnsafePickle(f"is no valid pickle ({type(error).__name__}: {str(error)[:100]})") from error
    raise UnsafePickle(
        "has no end" if len(window) <= MAX_PICKLE_BYTES else f"is longer than {MAX_PICKLE_BYTES:,} bytes"
    )


class _Machine:
    """pickle's stack machine over inert values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def count_copied(self, number: int) -> None:
        """Raises UnsafePickle: a short pickle that copies one long list again and again, to fill the memory."""
        self.copied += number
        if self.copied > MAX_OPCODES:
            raise UnsafePickle(f"makes more than {MAX_OPCODES:,} copies of values")

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise UnsafePickle("takes a value that is not there")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        values, self.stack[start:] = self.stack[start:], []
        return values

    def run(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _MEMO_PUT:
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif opcode in _MEMO_GET:
            self.stack.append(self.memo[int(argument)])
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise UnsafePickle(f"uses the opcode {opcode}, which no checkpoint needs")


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(_checked_name(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise UnsafePickle("names a class by something other than texts")
    machine.stack.append(_checked_name(module, name))


def _checked_name(module: str, name: str) -> Name:
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


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.stack.append(_called(function, arguments, machine))


def _called(function: Any, arguments: Any, machine: _Machine) -> Any:
    """What calling `function` stands for; only tensors, plain containers and objects of known classes do.

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
        machine.count_copied(len(pairs))
        return dict(pairs) if isinstance(pairs, dict) else {_key(key): value for key, value in pairs}
    if name in ("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "torch.Size"):
        machine.count_copied(len(arguments[0]) if arguments else 0)
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


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.pop(), machine.pop()
    machine.stack.append(_called(kind, arguments, machine))


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


def _persistent(machine: _Machine, _: Any) -> None:
    """torch's reference to a storage: ("storage", type, key, location, numel[, view]).

    The legacy format also has ("module", class, file, source text) of each class of a module: its source is not read.
    """
    found = machine.pop()
    if isinstance(found, tuple) and len(found) == 4 and found[0] == "module" and isinstance(found[1], Name):
        machine.stack.append(found[1])
        return
    if (
        not isinstance(found, tuple)
        or len(found) not in (5, 6)
        or found[0] != "storage"
        or not isinstance(found[1], Name)
    ):
        raise UnsafePickle("refers to something outside the file that is no storage")
    if len(found) == 6 and found[5] is not None:
        raise UnsafePickle("has a view of a storage, as torch wrote before 0.4")
    kind, key, numel = found[1].name, found[2], found[4]
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 40:
        raise UnsafePickle("has a storage with an impossible size")
    machine.stack.append(Storage(kind, key, numel))


def _build(machine: _Machine, _: Any) -> None:
    """State of the object below it. OrderedDicts have one too (`_metadata`), and parameters: no weights are in those."""
    state = machine.pop()
    target = machine.stack[-1]
    if isinstance(target, Record):
        target.state = state
    elif not isinstance(target, dict | StoredTensor):
        raise UnsafePickle("gives a state to something that is no object")


def _append(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list | Record):
        raise UnsafePickle("appends to something that is no list")
    (target.elements if isinstance(target, Record) else target).extend(values)


def _set_items(target: Any, values: list[Any]) -> None:
    if not isinstance(target, dict | Record) or len(values) % 2:
        raise UnsafePickle("sets items of something that is no dictionary")
    items = target.items if isinstance(target, Record) else target
    for key, value in zip(values[::2], values[1::2], strict=True):
        items[_key(key)] = value


def _key(key: Any) -> Hashable:
    """Only plain keys: hashing nested ones recurses as deep as the file likes."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(not isinstance(part, str | int | float | bool | bytes | Name | None) for part in parts):
        raise UnsafePickle(f"has a key of type {type(key).__name__}")
    return key


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine.stack[-1], [key, value])


def _append_one(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    _append(machine.stack[-1], [value])


def _appends(machine: _Machine, _: Any) -> None:
    values = machine.pop_mark()
    _append(machine.stack[-1], values)


def _items(machine: _Machine, _: Any) -> None:
    values = machine.pop_mark()
    _set_items(machine.stack[-1], values)


def _dict(machine: _Machine, _: Any) -> None:
    values = machine.pop_mark()
    made: dict[Hashable, Any] = {}
    _set_items(made, values)
    machine.stack.append(made)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return step


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(len(machine.stack))


_VALUES = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    ]
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_MEMO_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_MEMO_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "MARK": _mark,
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "APPEND": _append_one, "APPENDS": _appends, "ADDITEMS": _appends,
    "DICT": _dict, "SETITEM": _set_item, "SETITEMS": _items,
    "GLOBAL": _global, "STACK_GLOBAL": _stack_global, "REDUCE": _reduce, "NEWOBJ": _new_object, "BUILD": _build,
    "BINPERSID": _persistent,
}  # fmt: skip
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
