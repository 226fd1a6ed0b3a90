"""Checks of the installation for faults that would otherwise end in a traceback from another library.

transformers tests whether torchvision is installed, not whether it works. torchvision from the package index beside a
CPU-only torch is installed but does not import ("operator torchvision::nms does not exist"), and then neither EfficientNet
nor CLIP can be imported. The engine does not use torchvision.
"""

import importlib
import importlib.util

from engine.errors import InputError


def check_torchvision() -> None:
    """Passes if torchvision is absent (0.1 ms, nothing imported) or can be imported.

    Raises:
        InputError: torchvision is installed and does not import beside this torch.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise InputError(
            "torchvision",
            f"installed, but does not import ({error})",
            "transformers cannot load EfficientNet or CLIP beside it: run `pip uninstall torchvision`",
        ) from error
