"""The plain ground of cut-outs: its colour, `#rrggbb`. Without numpy and Pillow, for commands and configs."""

import re
from typing import Any

from engine.errors import InputError

DEFAULT_GROUND = "#eeeeec"  # light grey: on white, white cloth would vanish


def ground_rgb(ground: Any) -> tuple[int, int, int]:
    """The colour of `#rrggbb`.

    Raises:
        InputError: anything else.
    """
    if not isinstance(ground, str) or not re.fullmatch("#[0-9a-fA-F]{6}", ground):
        raise InputError("ground", ground, f'must be a colour as "#rrggbb", such as "{DEFAULT_GROUND}"')
    red, green, blue = bytes.fromhex(ground[1:])
    return red, green, blue
