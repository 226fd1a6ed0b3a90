"""The compiled libraries of kernels/cpu: extension modules without a Python interface, for ctypes.

They are built when the package is installed, one for each instruction set. They are optional: a machine without a C++ compiler, or
not of x86, has none of them.
"""

import ctypes
import importlib.util
import os
from typing import Literal

InstructionSet = Literal["avx2", "avx512"]


def load_library(name: str, instructions: InstructionSet, interface: str, version: int) -> ctypes.CDLL | None:
    """The library `kernels._<name>_<instructions>`; None where the package was installed without it.

    The caller knows that the processor has the instructions.

    Args:
        interface: the library's function that returns its version: another one was built from older or newer sources.
    """
    spec = importlib.util.find_spec(f"kernels._{name}_{instructions}")
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        found = getattr(library, interface)()
    except (OSError, AttributeError):  # built for another system
        return None
    return library if found == version else None
