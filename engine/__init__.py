"""How the model learns and generates. Imports `kernels`; never ray, never `serve`."""

from pathlib import Path as _Path

import kernels as _kernels

__version__ = "0.1.0"  # the only place: pyproject.toml reads it

# The PyPI package `kernels` (Hugging Face) has our folder's name: with it installed, imports mix silently.
_ours = _Path(__file__).resolve().parent.parent
if _kernels.__file__ is None or _Path(_kernels.__file__).resolve().parent.parent != _ours:
    raise ImportError(
        f"`import kernels` found {_kernels.__file__}, expected {_ours / 'kernels'}: "
        "run `pip uninstall kernels` (the PyPI package of that name shadows this project's folder)"
    )
