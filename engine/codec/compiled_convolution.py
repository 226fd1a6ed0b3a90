"""Which compiled convolutions (kernels.convolution) this processor runs, if the package was built with them."""

import ctypes
import functools
import sys

from engine.device import compiled_set
from kernels import convolution


@functools.cache
def convolution_library() -> ctypes.CDLL | None:
    """The library for this processor, within the limits that the environment sets; None where there is none.

    Where only the library is missing, stderr says so once.
    """
    instructions = compiled_set()
    if instructions is None:
        return None
    library = convolution.load(instructions)
    if library is None:
        print(
            "codec: the compiled convolutions were not built with this installation (no C++ compiler?): slower, by torch's operators",
            file=sys.stderr,
        )
    return library
