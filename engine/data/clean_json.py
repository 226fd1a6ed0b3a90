"""JSON whose texts are in their normal form: labels, and the lines of prepared folders."""

import json
from typing import Any

from engine.text import clean_name, is_clean_name


def read_clean_json(text: str, *, file_name: str = "") -> Any:
    """The tree of a JSON text, every name and value as `engine.text.clean_name` has it.

    Args:
        file_name: name of a value that stays as it is, for it is a file's on the disk.

    Raises:
        TextFault: characters that no text has, also as escapes.
        ValueError: no JSON, nested too deep, or a number of more digits than Python reads.
    """
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    # A label has hundreds of names; one look at the whole is enough unless it has escapes.
    return tree if is_clean_name(text) and "\\u" not in text else _cleaned(tree, file_name)


def _cleaned(tree: Any, file_name: str) -> Any:
    if isinstance(tree, str):
        return clean_name(tree, field="value")
    if isinstance(tree, list):
        return [_cleaned(value, file_name) for value in tree]
    if isinstance(tree, dict):
        return {
            clean_name(name): value if name == file_name else _cleaned(value, file_name) for name, value in tree.items()
        }
    return tree
