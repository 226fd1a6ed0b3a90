"""Sampling parameters: how image tokens are sampled, how many images are generated, and how many are returned.

The one owner of their types, bounds and descriptions. The generation config of a model folder, the options of the
command line, the HTTP schema, the OpenAPI document and the page's controls are derived from `FIELDS`.

Without torch, so that an API server can check a request before any model is loaded.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from engine.errors import InputError
from engine.text import clean_text, shown

Number = int | float
# By KoCLIP's score of the finished image, or by the log-likelihood of what an init image keeps after the mask.
RankBy = Literal["koclip", "log_likelihood"]

# Beyond these float32 arithmetic overflows or divides by zero: logits / 1e-40 are infinities, of which the first wins.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE, _MOST_GUIDANCE, _LEAST_TOP_P = 0.01, 100.0, 100.0, 1e-6


@dataclass(frozen=True)
class FieldSpec:
    """Type, bounds and description of one parameter."""

    name: str
    type: type[int] | type[float]
    default: Number | None  # None: the parameter may be left out
    least: Number
    greatest: Number
    description: str
    takes_zero: bool = False  # 0 is allowed too, though below `least`

    @property
    def range_text(self) -> str:
        """`0.01 to 100, or 0`."""
        span = f"{_number_text(self.least)} to {_number_text(self.greatest)}"
        return f"{span}, or 0" if self.takes_zero else span

    def check(self, value: Any, *, name: str = "") -> Any:
        """The value as a plain int or float.

        Whatever Python takes for an integer (`operator.index`, so numpy.int64 too) is one; whatever is a real number
        is taken for a float. Booleans are neither.

        Args:
            name: what the user calls the parameter, if not by its own name.

        Raises:
            InputError: another type, or a value out of bounds.
        """
        name = name or self.name
        if value is None and self.default is None:
            return None
        kind = "a whole number" if self.type is int else "a number"
        remedy = f"must be {kind}, {self.range_text}" + (", or left out" if self.default is None else "")
        number = _as_int(value) if self.type is int else _as_float(value)
        if number is None:
            raise InputError(name, repr(value), remedy)
        in_bounds = self.least <= number <= self.greatest or (self.takes_zero and number == 0)
        if not in_bounds:  # NaN too
            raise InputError(name, value, remedy)
        return number + 0  # no negative zero


def _as_int(value: Any) -> int | None:
    if _is_boolean(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _as_float(value: Any) -> float | None:
    if _is_boolean(value) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits
        return math.inf


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ == "bool"  # numpy.bool, without importing numpy


def _number_text(number: Number) -> str:
    """2**64 - 1 rather than 18446744073709551615."""
    if isinstance(number, int) and number > 2**20:
        power = number.bit_length()
        return (
            f"2**{power} - 1"
            if number == 2**power - 1
            else f"2**{power - 1}"
            if number == 2 ** (power - 1)
            else str(number)
        )
    return f"{number:g}"


def _parameter(
    default: Number | None,
    type_: type[int] | type[float],
    least: Number,
    greatest: Number,
    description: str,
    *,
    takes_zero: bool = False,
) -> Any:
    """A dataclass field with its `FieldSpec`, but for the name, in the metadata."""
    spec = {"type": type_, "least": least, "greatest": greatest, "description": description, "takes_zero": takes_zero}
    return field(default=default, metadata=spec)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. The filters act on the image vocabulary in this order: `reference.filter_logits`.

    Guidance: logits_null + guidance_scale * (logits - logits_null); 1 costs nothing, any other value a second sequence.
    `reference.ancestor_top_k` translates KoDALLE's filter_thres to top_k.

    Raises:
        InputError: a wrong type or a value out of bounds, by name.
    """

    temperature: float = _parameter(
        1.0, float, _LEAST_TEMPERATURE, _MOST_TEMPERATURE,
        "1 is the model's own distribution, 0 takes the likeliest token", takes_zero=True,
    )  # fmt: skip
    top_k: int | None = _parameter(None, int, 1, 2**31 - 1, "sample among the k likeliest tokens")
    top_p: float | None = _parameter(
        None, float, _LEAST_TOP_P, 1.0, "of those, sample among the fewest tokens that reach this probability"
    )
    guidance_scale: float = _parameter(
        1.0, float, 0.0, _MOST_GUIDANCE, "1 is no guidance, which is fastest; above 1: closer to the caption"
    )
    seed: int = _parameter(0, int, 0, 2**64 - 1, "candidate i of a seed is always the same image")
    candidates: int = _parameter(16, int, 1, 2**32, "images generated and ranked for a caption")
    top: int | None = _parameter(None, int, 1, 2**32, "images returned: the best of the candidates")

    def __post_init__(self) -> None:
        for name, spec in FIELDS.items():
            if hasattr(self, name):
                object.__setattr__(self, name, spec.check(getattr(self, name)))
        if self.top is not None and self.top > self.candidates:
            raise InputError("top", self.top, f"is more than the {self.candidates} candidates: lower it")

    @property
    def num_returned(self) -> int:
        """Images returned: `top`, or all candidates."""
        return self.candidates if self.top is None else self.top

    @property
    def is_guided(self) -> bool:
        """Whether each sequence needs an unconditional one beside it."""
        return self.guidance_scale != 1

    def updated(self, **values: Number | None) -> "SamplingParams":
        """A copy with other values; None leaves a value as it is."""
        changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(self, **changes)

    def generation_values(self) -> dict[str, Number | None]:
        """The parameters that a model folder has defaults of (`GENERATION_FIELDS`)."""
        values = asdict(self)
        return {name: values[name] for name in GENERATION_FIELDS}


FIELDS: dict[str, FieldSpec] = {
    one.name: FieldSpec(name=one.name, default=one.default, **one.metadata)  # type: ignore[arg-type]
    for one in fields(SamplingParams)
}
"""Every sampling parameter by name."""

INIT_IMAGE_FIELDS: dict[str, FieldSpec] = {
    "strength": FieldSpec(
        "strength", float, None, 0.0, 1.0,
        "share of an init image's tokens that are sampled anew, the least likely first; 0 keeps all, 1 none",
    )
}  # fmt: skip
"""Parameters of an init image (engine/pipeline/init_image.py) by name."""

GENERATION_FIELDS = ("temperature", "top_k", "top_p", "guidance_scale")
"""Parameters of the distribution; the others select samples of it, and a model has no default of them."""

_CANDIDATE = FieldSpec("candidate", int, 0, 0, 2**32 - 1, "number of the image among its seed's")


def check_captions(captions: Any) -> list[str]:
    """The captions as a list of strings in their normal form (engine/text.py).

    Raises:
        InputError: not a list or tuple of strings, no caption at all, one in which nothing is visible, or one with characters
            that no text has.
    """
    if isinstance(captions, str | bytes) or not isinstance(captions, Sequence):  # else one caption a letter
        raise InputError("captions", _shown(captions), "give a list of strings")
    for caption in captions:
        if not isinstance(caption, str):
            raise InputError("captions", _shown(caption), "every caption must be a string")
    if not captions:
        raise InputError("caption", "[]", "give a caption that is not empty")
    cleaned = [clean_text(caption) for caption in captions]
    for caption, text in zip(captions, cleaned, strict=True):
        if not text:
            raise InputError("caption", shown(caption), "give a caption that is not empty")
    return cleaned


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclass(frozen=True)
class SequenceRequest:
    """One image to sample: candidate number `candidate` for caption `prefix_index`."""

    prefix_index: int
    sampling_params: SamplingParams = SamplingParams()
    candidate: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sampling_params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, not {type(self.sampling_params).__name__}")
        object.__setattr__(self, "candidate", _CANDIDATE.check(self.candidate))

    @property
    def seed(self) -> int:
        return self.sampling_params.seed
