"""The reference of all configuration keys as Markdown, generated from the sections of engine/config/.

python -m engine.config_docs > docs/configuration.md
"""

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from engine.config.run import Run
from engine.config.section import Section
from engine.config.stages import DvaeRun, KoclipRun, KodalleRun, VqganRun

RUNS: tuple[type[Run], ...] = (VqganRun, DvaeRun, KoclipRun, KodalleRun)
COMMAND = "python -m engine.config_docs > docs/configuration.md"
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
_HEADER = "| key | type | default | description |\n|---|---|---|---|"
_INTRODUCTION = f"""# Configuration

Generated from `engine/config/`; do not edit it. After a change there: `{COMMAND}`

A training reads one YAML file and `key=value` overrides, with dots between section and key:

    deepspeed engine/train.py --config configs/demo/vqgan.yaml loop.steps=100 deepspeed.optimizer.params.lr=1e-4

The command line wins over the file, and the file over the defaults below. An unknown key, a value of another type or
out of its bounds, and the text "None" are errors that name key, value and file; write `null` for no value. The file of
a run is stored with all defaults as `<run>/config.yaml`.

`stage` says which of the four trainings a file is of.
"""


def configuration_page() -> str:
    """The whole page, ending with a newline."""
    shared = [name for name in Run.model_fields if name != "stage"]
    parts = [_INTRODUCTION, "## Every training\n", _table(Run, shared), *_sections(Run, shared)]
    for run in RUNS:
        own = [name for name in run.model_fields if name not in Run.model_fields]
        stage = get_args(run.model_fields["stage"].annotation)[0]
        parts += [f"## `stage: {stage}`\n", f"{_summary(run)}\n", _table(run, own), *_sections(run, own)]
    return "\n".join(parts)


def _sections(owner: type[Section], names: list[str]) -> Iterator[str]:
    """Headline, summary and table of each field that is a section."""
    for name in names:
        field = owner.model_fields[name]
        kind, default = _section_of(field), field.default
        if kind is not None:
            yield f"### `{name}:`\n"
            if field.description and kind is field.annotation:  # otherwise the row of its `null` has it
                yield f"{field.description[0].upper()}{field.description[1:]}.\n"
            yield f"{_summary(kind)}\n"
            yield _table(default if isinstance(default, Section) else kind, list(kind.model_fields))


def _table(owner: Section | type[Section], names: list[str]) -> str:
    """Rows of the fields that are no sections, or may be none; the values of an instance are its defaults."""
    rows = []
    for name, field in (owner if isinstance(owner, type) else type(owner)).model_fields.items():
        if name in names and _section_of(field) is not field.annotation:
            is_required = isinstance(owner, type) and field.is_required()
            value = field.default if isinstance(owner, type) else getattr(owner, name)
            rows.append(_row(name, field, "required" if is_required else f"`{_value_text(value)}`"))
    return "\n".join([_HEADER, *rows]) + "\n"


def _row(name: str, field: FieldInfo, default: str) -> str:
    bounds = [
        f"{sign} {getattr(constraint, attribute)}"
        for constraint in field.metadata
        for attribute, sign in _BOUNDS
        if hasattr(constraint, attribute)
    ]
    kind = ", ".join([_type_text(field.annotation), *bounds])
    description = (
        "the training that this file is of" if name == "stage" else (field.description or "").replace("<", "\\<")
    )
    return f"| `{name}` | {kind} | {default} | {description} |"


def _type_text(kind: Any) -> str:
    """A type in YAML's words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(part) for part in arguments)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}s"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, Section)):
        return "section"
    names = {
        int: "integer",
        float: "number",
        bool: "`true` or `false`",
        str: "text",
        Path: "path",
        type(None): "`null`",
    }
    return names[kind]


def _value_text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    return str(value)


def _summary(kind: type) -> str:
    """The docstring, its lines joined within paragraphs."""
    paragraphs = inspect.getdoc(kind) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs.split("\n\n"))


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section of a field, which may be `null` as well."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
