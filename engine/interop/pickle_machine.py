"""Pickles read without being run: pickle's stack machine over inert values.

The standard library's `pickletools` splits a pickle into opcodes and their arguments; the interpreter below puts them
together as dictionaries, lists and the values of engine/interop/pickle_values.py. It never imports a module and never calls anything
that a file names.
"""

import io
import pickletools
from collections.abc import Callable, Hashable
from typing import Any

from engine.interop.pickle_values import (
    Name,
    Record,
    Storage,
    StoredTensor,
    UnsafePickle,
    called,
    checked_name,
    plain_key,
)

MAX_PICKLE_BYTES = 16 << 20  # tensors are stored outside; a 64-layer DALLE with its optimiser has 1 MB
MAX_OPCODES = 500_000  # an opcode of one byte can make an object of a hundred


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
    machine.stack.append(checked_name(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise UnsafePickle("names a class by something other than texts")
    machine.stack.append(checked_name(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.stack.append(called(function, arguments, count_copied=machine.count_copied))


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.pop(), machine.pop()
    machine.stack.append(called(kind, arguments, count_copied=machine.count_copied))


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
        items[plain_key(key)] = value


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
