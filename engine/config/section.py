"""Base of all configuration sections: strict and frozen, derived values as properties, never stored.

Sections are read from YAML by engine/config_files.py. `docs/configuration.md` is generated from the fields of the runs and
their descriptions (engine/config_docs.py). The sections of the models (codec, transformer, ranker) are also what
`config.json` of a model folder holds.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

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
