"""Reading and writing of configuration files: YAML and `key=value` to the sections of engine/config/.

Precedence: defaults < YAML file < `key=value` on the command line. An unknown key, a wrong type or the text "None"
(which YAML reads as a string, so that the published KoDALLE recipe silently switched options on) is an InputError
that names the field and the file in one line.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from engine.config.run import Run
from engine.config.section import parse_section
from engine.config.stages import AnyRun, DvaeRun, KoclipRun, KodalleRun, VqganRun
from engine.config_folders import resolve_auto
from engine.errors import InputError

_RUN: TypeAdapter[VqganRun | DvaeRun | KoclipRun | KodalleRun] = TypeAdapter(AnyRun)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number (YAML 1.1 requires 1.0e-6) and rejects a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"key given twice: {', '.join(sorted(twice))}{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """The tree of a YAML text.

    Raises:
        yaml.YAMLError: no YAML, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # a number of more digits than Python reads, a date that is none
        raise yaml.YAMLError(f"a value that cannot be read: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error


def load_run(path: Path, overrides: list[str] | None = None) -> VqganRun | DvaeRun | KoclipRun | KodalleRun:
    """Reads a training config.

    Args:
        path: YAML file.
        overrides: `key=value` texts; dots go down (`deepspeed.optimizer.params.lr=1e-4`), values are YAML.

    Raises:
        InputError: names field, value, file and remedy.
    """
    tree = read_config_file(path, example="configs/demo/kodalle.yaml")
    for override in overrides or []:
        apply_override(tree, override)
    return parse_run(tree, source=f"{path} with the command line's key=value" if overrides else str(path))


def parse_run(tree: dict[str, Any], *, source: str) -> VqganRun | DvaeRun | KoclipRun | KodalleRun:
    """The training config that a tree states.

    Args:
        source: where it was read, for errors.

    Raises:
        InputError: names field, value, source and remedy.
    """
    _reject_none_text(tree, source)
    resolve_auto(tree)
    run: VqganRun | DvaeRun | KoclipRun | KodalleRun = parse_section(_RUN, tree, source=source)
    return run


def dump_yaml(run: Run) -> str:
    """The effective config, as YAML that `load_run` reads back to an equal object."""
    return dump_tree(run.model_dump(mode="json"))


def dump_tree(tree: dict[str, Any]) -> str:
    """A tree as YAML, keys in their order."""
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


def read_config_file(path: Path, *, example: str) -> dict[str, Any]:
    """The tree of a config file.

    Args:
        example: a file of its kind, named in the error.

    Raises:
        InputError: no such file, no YAML, a key given twice, or no `key: value` lines.
    """
    if not path.is_file():
        raise InputError("config", path, f"no such file: give a YAML file, e.g. {example}")
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("config", path, f"is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError("config", path, "must hold `key: value` lines")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `key=value` text in a tree.

    Raises:
        InputError: no `=`, a value that is not YAML, or a path through something that is no section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError("override", _shortened(override), "write it as key=value, e.g. loop.steps=100")
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError("override", _shortened(override), f"`{parent}` is a value, not a section")
        tree = child
    try:
        tree[last] = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError("override", _shortened(override), f"the value is not valid YAML: {error}") from error


def _shortened(override: str, limit: int = 120) -> str:
    return override if len(override) <= limit else f"{override[: limit - 1]}…"


def _reject_none_text(node: Any, source: str, where: str = "") -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _reject_none_text(value, source, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _reject_none_text(value, source, f"{where}.{index}")
    elif node == "none" and (where.startswith("deepspeed.") or where == "loss.perceptual"):
        pass  # a value of its own there; DeepSpeed has offload_optimizer.device, for one
    elif node in ("None", "none", "NONE"):
        raise InputError(where, repr(node), f"is a text, not 'nothing' (in {source}): write null, or remove the line")
