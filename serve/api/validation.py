"""JSON objects and forms as request models (serve/api/schemas.py): the first fault ends it, named, without the value.

No torch, no ray.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from serve.api.body import MAX_NUMBER_CHARACTERS, parse_number
from serve.api.errors import Failure, invalid_value
from serve.api.forms import printable

AnyRequest = TypeVar("AnyRequest", bound=BaseModel)


def read_request(kind: type[AnyRequest], values: Mapping[str, Any]) -> AnyRequest:
    """`values` of a JSON object as a request; raises Failure naming the first invalid field."""
    for name in values:  # before pydantic, which describes each of 100,000 unknown ones
        if name not in kind.model_fields:
            raise _unknown(printable(name))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # never include the input: it may be large, and it is often the caption
        raise _as_failure(error.errors(include_url=False, include_input=False, include_context=False)[0]) from None


def read_text_request(kind: type[AnyRequest], fields: Mapping[str, str]) -> AnyRequest:
    """`read_request` for a form, whose numbers and booleans arrive as text."""
    return read_request(kind, {name: _from_text(kind, name, text) for name, text in fields.items()})


# Numbers are read as JSON's (7.0 is an integer, +7, 07 and 1_000 are none). Booleans in any case: Python's clients send True.
_BOOLEANS = {"true": True, "false": False}


def _from_text(kind: type[BaseModel], name: str, text: str) -> Any:
    field = kind.model_fields.get(name)
    wanted = () if field is None else get_args(field.annotation)
    if bool in wanted:
        value = _BOOLEANS.get(text.strip(" \t\r\n").lower()) if len(text) <= MAX_NUMBER_CHARACTERS else None
        if value is None:
            raise _wrong_type(name, "true or false", "true 또는 false")
        return value
    if int in wanted or float in wanted:
        number = parse_number(text)
        if number is None:
            raise _wrong_type(name, *_TYPES["int_type" if int in wanted else "finite_number"])
        return number  # a fraction where an integer is wanted fails as it does in JSON
    return text


_TYPES = {
    "int_type": ("an integer", "정수"),
    "float_type": ("a number", "숫자"),
    "finite_number": ("a finite number", "유한한 숫자"),
    "string_type": ("a string", "문자열"),
    "bool_type": ("true or false", "true 또는 false"),
}


def _as_failure(fault: Any) -> Failure:
    name = printable(".".join(map(str, fault["loc"][:1])))
    if fault["type"] == "missing":
        return Failure("missing_required_parameter", f"Add `{name}`.", f"`{name}` 항목을 넣어 주세요.", param=name)
    if fault["type"] in _TYPES:
        return _wrong_type(name, *_TYPES[fault["type"]])
    return invalid_value(name, fault["msg"][:1].lower() + fault["msg"][1:], f"허용되지 않는 값입니다({fault['msg']})")


def _unknown(name: str) -> Failure:
    return Failure(
        "unknown_parameter", f"Remove `{name}` or correct its spelling.", f"`{name}` 항목을 확인해 주세요.", param=name
    )


def _wrong_type(name: str, wanted: str, wanted_ko: str) -> Failure:
    return Failure("invalid_type", f"`{name}` must be {wanted}.", f"`{name}`: {wanted_ko} 값이어야 합니다.", param=name)
