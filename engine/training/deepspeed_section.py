"""The check of a config's `deepspeed:` section for keys that DeepSpeed would ignore without a warning.

DeepSpeed accepts `gradient_cliping: 1.0` and clips nothing, and `optimizer: {type: AdamW, parms: …}` trains at
the default rate. Its sections that are data models (zero_optimization, fp16, bf16) reject unknown keys themselves, and
optimisers and schedulers unknown parameters.
"""

import difflib
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import InputError

_WORD = re.compile(r"""["']([a-z][a-z0-9_]*)["']""")
_SECTIONS = {"optimizer": {"type", "params", "legacy_fusion"}, "scheduler": {"type", "params"}}


def check_keys(settings: dict[str, Any]) -> None:
    """Raises InputError for a key that the installed DeepSpeed does not know, with the nearest one that it knows."""
    _check(settings, _words(), "deepspeed")
    for section, known in _SECTIONS.items():
        if isinstance(settings.get(section), dict):
            _check(settings[section], known, f"deepspeed.{section}")


def _check(settings: dict[str, Any], known: set[str] | frozenset[str], where: str) -> None:
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            remedy = f"did you mean {near[0]}?" if near else "remove it"
            raise InputError(f"{where}.{key}", repr(value)[:120], f"DeepSpeed reads no such key: {remedy}")


@functools.cache
def _words() -> frozenset[str]:
    """All quoted words in DeepSpeed's files of constants and configs: a list of our own would be of one version."""
    spec = find_spec("deepspeed")
    assert spec is not None, "the caller imports it"
    assert spec.origin is not None, spec
    files = [
        path
        for path in Path(spec.origin).parent.rglob("*.py")
        if path.stem.endswith(("constants", "config", "config_utils"))
    ]
    return frozenset(word for path in files for word in _WORD.findall(path.read_text(encoding="utf-8")))
