"""Checks of a command's arguments that need no torch: what is wrong is said within half a second, before imports of seconds.

Everything else is checked where it is used.
"""

import re
from pathlib import Path

from engine.errors import InputError
from engine.files import check_file_place
from engine.models.folder_config import PartName, part_config, read_config

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def check_device(device: str) -> None:
    """Raises InputError for a name that no device of generation has; whether the machine has it, `pick_device` finds out."""
    if device and _DEVICE.fullmatch(device) is None:
        raise InputError("--device", device, "is no device for generation: write cpu, cuda or cuda:1")


def check_model(folder: Path, *parts: PartName) -> None:
    """Raises InputError for a folder without a model or one of `parts`."""
    read_config(folder)
    for name in parts:
        part_config(folder, name)


def check_pairs(folder: Path) -> None:
    """Raises InputError where there is no such folder; what is in it is read later."""
    if not folder.is_dir():
        raise InputError("pairs", folder, "no such folder: give one made by `kodalle data prepare`, or name.jpg + .txt")


def check_out_folder(folder: Path) -> None:
    """Raises InputError for a place of results that is a file or cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise InputError("--out", folder, "is a file: give a folder")
    check_file_place(folder / "result.json", field="--out")
