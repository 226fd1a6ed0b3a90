"""Imports that take seconds, made within a command once its arguments are checked."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """The garbage collector's pause: nothing that modules define is garbage, and looking for some is a sixth of torch's import.

    At the end of the process it has to look through them three times more, which takes half a second, for memory that the
    process gives back at once anyway.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        atexit.unregister(_leave_memory)
        atexit.register(_leave_memory)


def _leave_memory() -> None:
    if "triton" not in sys.modules:  # whose objects complain when they are not collected
        gc.freeze()
