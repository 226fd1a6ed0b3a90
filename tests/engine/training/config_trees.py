"""Configs of tiny runs with one value changed."""

from typing import Any

Tree = dict[str, Any]


def with_value(tree: Tree, key: str, value: Any) -> Tree:
    """The tree itself with `section.key` set, or left out where the value is None."""
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        section[parent] = dict(section.get(parent, {}))
        section = section[parent]
    if value is None:
        section.pop(last)
    else:
        section[last] = value
    return tree
