"""Checks of a config's `deepspeed:` section: keys that DeepSpeed would ignore without a warning, and values that it would choose.

A default of DeepSpeed that changes the arithmetic must be written out, so that a config says what is computed whatever the
installed version: since 0.19 it clips gradients at 1.0 where nothing is stated, `type: Adam` is AdamW unless `adam_w_mode: false`
says otherwise, and warm-up is logarithmic.

DeepSpeed accepts `gradient_cliping: 1.0` and clips nothing, and `optimizer: {type: AdamW, parms: …}` trains at
the default rate. Its sections that are data models (zero_optimization, fp16, bf16) reject unknown keys themselves, and
optimisers and schedulers unknown parameters.
"""

import copy
import difflib
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import InputError

_WORD = re.compile(r"""["']([a-z][a-z0-9_]*)["']""")
_SECTIONS = {"optimizer": {"type", "params", "legacy_fusion"}, "scheduler": {"type", "params"}}


def check_keys(settings: dict[str, Any]) -> None:
    """Raises InputError for a key that the installed DeepSpeed does not know, with the nearest one that it knows."""
    _check(settings, _words(), "deepspeed")
    for section, known in _SECTIONS.items():
        if isinstance(settings.get(section), dict):
            _check(settings[section], known, f"deepspeed.{section}")


class Default(NamedTuple):
    """A value that DeepSpeed takes where a section states none; `path` has dots."""

    path: str
    value: Any
    why: str


def check_defaults(settings: dict[str, Any], *, processes: int = 1) -> None:
    """Raises InputError for defaults that change the arithmetic and are not written out, all of them in one message."""
    missing = unstated(settings, processes=processes)
    if missing:
        listed = "; ".join(f"{one.path}: {_shown(one.value)} ({one.why})" for one in missing)
        raise InputError(
            f"deepspeed.{missing[0].path}",
            "(nothing)",
            f"DeepSpeed would choose what changes the arithmetic: write it out, as it would be, or as you want it: {listed}",
        )


def unstated(settings: dict[str, Any], *, processes: int = 1) -> list[Default]:
    """Defaults of DeepSpeed 0.19 that apply to a section, change the arithmetic, and are not written out in it.

    Args:
        processes: of the training; some defaults matter to several alone.
    """
    optimizer, scheduler = _section(settings, "optimizer"), _section(settings, "scheduler")
    found = [Default("gradient_clipping", 1.0, "gradients are clipped at this norm; 0: not")]
    if optimizer.get("type") is not None:
        found.append(Default("optimizer.params.lr", 1e-3, "the learning rate"))
        if str(optimizer["type"]).lower() == "adam":
            found.append(Default("optimizer.params.adam_w_mode", True, "makes AdamW of Adam; false: Adam"))
    kind = str(scheduler.get("type", ""))
    if kind.startswith("Warmup"):
        found += [
            Default("scheduler.params.warmup_num_steps", 1000, "steps of warm-up"),
            Default("scheduler.params.warmup_type", "log", "the rate rises by the logarithm of the step; linear"),
        ]
    if kind == "WarmupCosineLR":
        found.append(Default("scheduler.params.cos_min_ratio", 1e-4, "share of the rate at the end"))
    fp16 = _section(settings, "fp16")
    if fp16.get("enabled") and not fp16.get("loss_scale"):
        found += [
            Default("fp16.initial_scale_power", 16, "the loss scale starts at 2 to this power"),
            Default("fp16.loss_scale_window", 1000, "steps after which the loss scale doubles"),
            Default("fp16.hysteresis", 2, "overflows until the loss scale is halved"),
            Default("fp16.min_loss_scale", 1, "the least loss scale"),
        ]
    half = "fp16" if fp16.get("enabled") else "bf16" if _section(settings, "bf16").get("enabled") else None
    if half and settings.get("gradient_accumulation_steps", 1) != 1:
        found.append(Default("data_types.grad_accum_dtype", half, "gradients of micro batches are summed in it"))
    if half and processes > 1:
        found.append(Default("communication_data_type", half, "gradients of the ranks are summed in it; fp32"))
    return [one for one in found if not _is_stated(settings, one.path)]


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The section with those defaults written out: two sections that compute the same are then equal."""
    whole = copy.deepcopy(settings)
    for path, value, _ in unstated(settings):
        *parents, last = path.split(".")
        section = whole
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return whole


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, dict) else {}


def _is_stated(settings: dict[str, Any], path: str) -> bool:
    section: Any = settings
    for name in path.split("."):
        if not isinstance(section, dict) or name not in section:
            return False
        section = section[name]
    return True


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
