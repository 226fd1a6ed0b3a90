"""Base of all configuration sections: strict and frozen, derived values as properties, never stored; and how a tree becomes one.

Sections are read from YAML by engine/config_files.py. `docs/configuration.md` is generated from the fields of the runs and
their descriptions (engine/config_docs.py). The sections of the models (codec, transformer, ranker) are also what
`config.json` of a model folder holds.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from engine.errors import InputError

Place = TypeVar("Place", Path, str)


def in_home(place: Place) -> Place:
    """`~/x` as a shell reads it, which leaves it alone in `run=~/x` and in YAML."""
    if not str(place).startswith("~"):
        return place
    try:
        return type(place)(Path(place).expanduser())
    except RuntimeError as error:
        raise ValueError(str(error).rstrip(".")) from error


FolderOrName = Annotated[str, AfterValidator(in_home)]
"""A folder, or a name on the Hugging Face hub. Other texts may start with `~`: a caption, for one."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _paths_in_home(cls, value: Any) -> Any:
        return in_home(value) if isinstance(value, Path) else value


def parse_section(kind: Any, tree: Any, *, source: str) -> Any:
    """Validates `tree` as `kind` (a Section class or TypeAdapter); the first fault becomes an InputError.

    Goes through JSON, whose strict mode accepts a text for a path and a list for a tuple, but not `yes` for 1 or "8"
    for 8.
    """
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise as_input_error(error, source) from error


def as_input_error(error: ValidationError, source: str) -> InputError:
    """The first fault as field, value and remedy; `source` names the file that it was read from."""
    first = error.errors()[0]
    # the discriminated union puts the stage's name in front of the field's path
    path = first["loc"][1:] if first["loc"][:1] in (("vqgan",), ("dvae",), ("koclip",), ("kodalle",)) else first["loc"]
    field = ".".join(map(str, path)) or ("config" if first["type"] == "value_error" else "stage")
    others = f" (and {error.error_count() - 1} more faults)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        remedy = "unknown key: remove it or mend its spelling"
    elif first["type"] == "missing":
        remedy = "is missing: add it"
    else:
        remedy = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # options that do not go together
        value = "(several options)"
    elif first["type"] in ("missing", "union_tag_not_found"):
        value = "(nothing)"
    elif first["type"] == "union_tag_invalid":
        value = repr(first["ctx"]["tag"])
    else:
        value = repr(first["input"])[:120]
    return InputError(field, value, f"{remedy}, in {source}{others}")
