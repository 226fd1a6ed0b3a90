"""Base of all configuration sections: strict and frozen, derived values as properties, never stored.

Sections are read from YAML by engine/config_files.py. `docs/configuration.md` is generated from the fields of the runs and
their descriptions (engine/config_docs.py). The sections of the models (codec, transformer, ranker) are also what
`config.json` of a model folder holds.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _in_home(cls, value: Any) -> Any:
        """`~/x` as a shell reads it, which leaves it alone in `run=~/x` and in YAML."""
        if isinstance(value, Path | str) and str(value).startswith("~"):
            try:
                return type(value)(Path(value).expanduser())
            except RuntimeError as error:
                raise ValueError(str(error).rstrip(".")) from error
        return value
