"""The OpenAPI 3.1 document of the API, and the same as an HTML page without scripts or external resources.

Written here and not derived by FastAPI, because the API does not use FastAPI's body reader, and because the document
contains the running server's limits. Field lists come from the models of serve/api/schemas.py, so they cannot differ from
what is validated.
"""

import html
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from engine.data.caption_guide import CaptionGuide
from engine.pipeline.provenance import Provenance
from engine.text import TEXT_PATTERN, VISIBLE_TEXT_PATTERN
from serve.api.errors import FAILURES
from serve.api.schemas import EditRequest, GenerationRequest, TokenizeRequest, bounds, spec_of
from serve.messages import ModelInfo
from serve.settings import ServeSettings

Json = dict[str, Any]

_IMAGE_PARTS: Json = {name: {"contentType": "image/png, image/webp, image/jpeg"} for name in ("image", "mask")}
_WHOLE: Json = {"type": "integer"}
_TEXT: Json = {"type": "string"}
_TEXTS: Json = {"type": "array", "items": _TEXT}
_TEXT_OR_NULL: Json = {"type": ["string", "null"]}
_NUMBER: Json = {"type": "number"}
_NUMBER_OR_NULL: Json = {"type": ["number", "null"]}
_PARAMETER: Json = {
    "type": "object",
    "description": "a sampling parameter: values from minimum to maximum, and 0 where or_zero",
    "properties": {
        "type": {"enum": ["integer", "number"]},
        "minimum": _NUMBER,
        "maximum": _NUMBER,
        "or_zero": {"type": "boolean"},
        "description": _TEXT,
    },
    "required": ["type", "minimum", "maximum", "or_zero", "description"],
}

# Failures of groups of routes, besides internal errors.
_ACCESS = ("missing_api_key", "insufficient_scope")
_BODY = ("invalid_value", "request_timeout", "request_too_large", "unsupported_media_type")
_GENERATION = ("model_not_found", "rate_limit_exceeded", "unavailable", "deadline_exceeded")


def describe(settings: ServeSettings, info: ModelInfo, *, root_path: str = "") -> Json:
    """The OpenAPI document of a server with these settings, reached under `root_path`."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "KoDALLE",
            "version": "1",
            "summary": "Images from captions, compatible with OpenAI's Images API",
            "description": "Candidates are generated and ranked, the best n are returned. Every error has the same body, "
            "with its text in English and Korean. Every reply carries `x-request-id`.",
        },
        "servers": [{"url": root_path or "/"}],
        "security": [{"key": []}] if settings.keys_file else [],
        "paths": _paths(settings, info),
        "components": {
            "schemas": _schemas(settings, info),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths(settings: ServeSettings, info: ModelInfo) -> Json:
    captions = info.caption_guide.examples or ("a caption",)
    tokens = {"object": "tokens", "tokens": 9, "limit": info.text_seq_len, "characters": len(captions[0])}
    tokens |= {"tokens_unknown": 0, "words_unknown": [], "words_total": 5, "words_known": 5, "unknown": []}
    model_id = {
        "name": "model_id", "in": "path", "required": True, "schema": _TEXT, "example": info.model_id
    }  # fmt: skip
    return {
        "/v1/images/generations": {
            "post": _operation(
                "Generate images from a caption",
                "Images | SSE",
                _ACCESS + _BODY + _GENERATION,
                body={"application/json": {"schema": _ref("GenerationRequest"), "examples": _examples(captions)}},
            )
        },
        "/v1/images/edits": {
            "post": _operation(
                "Inpaint the masked part of an image, or regenerate all but its upper rows",
                "Images | SSE",
                _ACCESS + _BODY + _GENERATION,
                body={"multipart/form-data": {"schema": _ref("EditRequest"), "encoding": _IMAGE_PARTS}},
            )
        },
        "/v1/models": {"get": _operation("The served model, as a list", "ModelList", _ACCESS)},
        "/v1/models/{model_id}": {
            "get": _operation("A model by its id", "Model", (*_ACCESS, "model_not_found"), parameters=[model_id])
        },
        "/v1/tokenize": {
            "post": _operation(
                "Count a caption's tokens",
                "Tokens",
                _ACCESS + _BODY,
                body={"application/json": {"schema": _ref("TokenizeRequest"), "example": {"prompt": captions[0]}}},
                example=tokens,
            )
        },
        "/healthz": {"get": _operation("The server is running", "Status", (), is_open=True)},
        "/readyz": {"get": _operation("A worker accepts requests", "Status", ("unavailable",), is_open=True)},
        "/metrics": {"get": _operation("Prometheus metrics", "text/plain", _ACCESS)},
    }


def _examples(captions: Sequence[str]) -> Json:
    """Requests with the model's own example captions."""
    first, second, third = (captions[number % len(captions)] for number in range(3))
    return {
        "the best 4": {"value": {"prompt": first, "n": 4, "seed": 7}},
        "the best of 16 as WebP": {"value": {"prompt": second, "n": 1, "candidates": 16, "output_format": "webp"}},
        "streaming": {"value": {"prompt": third, "stream": True, "partial_images": 3}},
    }


def _operation(
    summary: str,
    answer: str,
    failures: tuple[str, ...],
    *,
    body: Json | None = None,
    parameters: list[Json] | None = None,
    example: Json | None = None,
    is_open: bool = False,
) -> Json:
    if answer == "text/plain":
        content: Json = {"text/plain": {"schema": _TEXT}}
    else:
        name = answer.partition(" | ")[0]
        content = {"application/json": {"schema": _ref(name)} | ({"example": example} if example else {})}
        if answer.endswith("SSE"):
            content["text/event-stream"] = {"schema": _ref("Event")}
    operation: Json = {
        "summary": summary,
        "responses": {"200": {"description": "Done", "headers": _HEADERS, "content": content}} | _errors(failures),
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    if parameters:
        operation["parameters"] = parameters
    if is_open:
        operation["security"] = []
    return operation


_EVENTS = [
    f"{route}.{event}"
    for route in ("image_generation", "image_edit")
    for event in ("queued", "progress", "partial_image", "candidate", "completed")
] + ["error"]
_NO_NUL = r"^[^\u0000]*$"
_HEADERS: Json = {"x-request-id": {"description": "identifies the request in the server's log", "schema": _TEXT}}


def _errors(codes: tuple[str, ...]) -> Json:
    """One response per status, which several codes may share."""
    by_status: dict[int, list[str]] = {}
    for code in (*codes, "internal_error"):
        status = FAILURES[code].status
        by_status[status] = sorted(name for name, kind in FAILURES.items() if kind.status == status)
    return {
        str(status): {
            "description": ", ".join(names),
            "headers": _HEADERS,
            "content": {"application/json": {"schema": _ref("Error")}},
        }
        for status, names in sorted(by_status.items())
    }


def _schemas(settings: ServeSettings, info: ModelInfo) -> Json:
    image = {
        "b64_json": {"type": ["string", "null"]},
        "seed": _WHOLE,
        "candidate": _WHOLE,
        "rank": _WHOLE,
        "clip_score": _NUMBER_OR_NULL,
        "contrast": _NUMBER_OR_NULL,
        "clip_score_percentile": _NUMBER_OR_NULL,
        "log_likelihood": _NUMBER_OR_NULL,
        "provenance": _ref("Provenance"),
    }
    unknown = {"tokens_unknown": _WHOLE, "words_unknown": _TEXTS, "words_total": _WHOLE, "words_known": _WHOLE}
    details = _object({"text_tokens": _WHOLE, "image_tokens": _WHOLE})
    usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _WHOLE)
    images = {
        "created": _WHOLE,
        "data": {"type": "array", "items": _ref("Image")},
        "background": {"const": "opaque"},
        "output_format": {"enum": ["png", "webp", "jpeg"]},
        "quality": {"enum": ["low", "medium", "high", "xhigh", "max"]},
        "size": _TEXT,
        "usage": _object(usage | {"input_tokens_details": details, "output_tokens_details": details}),
        "model": _TEXT,
        "request_id": _TEXT,
        "tokens_cut": _WHOLE,
        **unknown,
        "timings_s": {"type": "object", "additionalProperties": _NUMBER},
    }
    model = {
        "id": {"const": info.model_id},
        "object": {"const": "model"},
        "owned_by": _TEXT,
        "digest": _TEXT,
        "device": _TEXT,
        "has_ranker": {"type": "boolean"},
        "limits": {"type": "object", "additionalProperties": _NUMBER},
        "default_sampling_params": {"type": "object", "additionalProperties": _NUMBER_OR_NULL},
        "sampling_params": {"type": "object", "additionalProperties": _PARAMETER},
        "caption_guide": _ref("CaptionGuide"),
    }
    whole = ("created", "image_size", "grid_size", "text_seq_len", "num_parameters", "default_candidates")
    guide = CaptionGuide.model_json_schema(ref_template=_ref("{model}")["$ref"])
    del guide["properties"]["words"]  # not sent
    error = dict.fromkeys(("message", "message_ko", "type", "code"), _TEXT) | {"param": {"type": ["string", "null"]}}
    return {
        "GenerationRequest": _fields(GenerationRequest, settings, info),
        "EditRequest": _with_files(_fields(EditRequest, settings, info)),
        "TokenizeRequest": _fields(TokenizeRequest, settings, info),
        "Image": _object(image),
        **_provenance_schemas(),
        "Event": _object({"event": {"enum": _EVENTS}, "data": _TEXT | {"contentMediaType": "application/json"}}),
        "Images": _object(images, candidates={"type": "array", "items": _ref("Image")}),
        "Model": _object(model | dict.fromkeys(whole, _WHOLE)),
        **guide.pop("$defs"),
        "CaptionGuide": guide,
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "Tokens": _object(
            {
                "object": {"const": "tokens"},
                "tokens": _WHOLE,
                "limit": _WHOLE,
                "characters": _WHOLE,
                **unknown,
                "unknown": {"type": "array", "items": _ref("UnknownWord")},
            }
        ),
        "UnknownWord": _object(
            {"word": _TEXT, "start": _WHOLE, "end": _WHOLE, "suggestion": _TEXT_OR_NULL, "value": _TEXT_OR_NULL}
        ),
        "Status": _object({"status": _TEXT}),
        "Error": _object({"error": _object(error)}),
    }


def _provenance_schemas() -> Json:
    schema = Provenance.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    return {"Provenance": schema, **schema.pop("$defs", {})}


def _fields(kind: type[BaseModel], settings: ServeSettings, info: ModelInfo) -> Json:
    """The schema of a request with the running server's limits, restricted to accepted values."""
    schema = kind.model_json_schema()
    schema.pop("description", None)
    for name, (least, most) in bounds(settings.limits).items():
        choices, spec = schema["properties"].get(name, {}).get("anyOf", []), spec_of(name)
        for choice in choices:
            if choice.get("type") in ("integer", "number"):
                choice |= {"minimum": least, "maximum": most}
        if choices and spec is not None and spec.takes_zero:
            choices.insert(0, {"const": 0})
    properties = schema["properties"]
    properties["prompt"]["maxLength"] = settings.limits.max_prompt_characters
    properties["prompt"]["pattern"] = TEXT_PATTERN
    if kind is TokenizeRequest:
        return schema
    properties["prompt"]["pattern"] = VISIBLE_TEXT_PATTERN
    for name in ("user", "safety_identifier"):
        properties[name]["anyOf"][0]["pattern"] = _NO_NUL
    accepted: Json = {
        "model": info.model_id,
        "size": ["auto", f"{info.image_size}x{info.image_size}"],
        "background": ["opaque", "auto"],
        "response_format": "b64_json",
    }
    for name, values in accepted.items():
        choices = values if isinstance(values, list) else [values]
        properties[name] = {"enum": [*choices, None], "description": properties[name].get("description", "")}
    for name in ("complexity", "frame_count", "frame_duration_ms", "svg", "markup"):
        if name in properties:
            properties[name] = {"type": "null", "description": properties[name]["description"]}
    return schema


def _with_files(schema: Json) -> Json:
    """A form's schema: image files beside the fields, and no nulls, because a form has only text."""
    for name, field in list(schema["properties"].items()):
        choices = [choice for choice in field.pop("anyOf", []) if choice.get("type") != "null"]
        field |= choices[0] if choices else {}
        if "enum" in field:
            field["enum"] = [value for value in field["enum"] if value is not None]
        field.pop("default", None)
        if field.get("type") == "null":
            del schema["properties"][name]
    schema["properties"] |= {
        "image": {
            "type": "string",
            "format": "binary",
            "description": "the init image: PNG, WebP or JPEG (`image[]` is accepted, too, but only one file)",
        },
        "mask": {
            "type": "string",
            "format": "binary",
            "description": "as large as the image; its transparent pixels are regenerated, or its white ones if it has no "
            "transparency. Without a mask the image's own transparent pixels are regenerated",
        },
    }
    schema["required"] = ["image", "prompt"]
    return schema


def _object(properties: Json, **optional: Json) -> Json:
    return {"type": "object", "properties": properties | optional, "required": list(properties)}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# ------------------------------------------------------------------------------------------------------ as a page


def described_page(document: Json) -> str:
    """The document as HTML without scripts or style sheets, which works offline and under the security policy."""
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                name = content["schema"]["$ref"].rpartition("/")[2]
                parts.append(
                    f"<h3><code>{media_type}</code></h3>{_fields_table(document['components']['schemas'][name])}"
                )
            rows = [(status, answer["description"]) for status, answer in operation["responses"].items()]
            parts.append(_table(("status", "answer or error codes"), rows))
    title = html.escape(document["info"]["title"])
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title} API</title></head><body>'
        f"<h1>{title} API</h1><p>{html.escape(document['info']['description'])} "
        f'The same for programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</body></html>'
    )


def _fields_table(schema: Json) -> str:
    rows = []
    for name, field in schema["properties"].items():
        choices = field.get("anyOf", [field])
        values = " or ".join(filter(None, map(_values, choices)))
        needed = "required" if name in schema.get("required", ()) else ""
        rows.append((name, needed, values, field.get("description", "")))
    return _table(("field", "", "values", ""), rows)


def _values(choice: Json) -> str:
    if "enum" in choice:
        return ", ".join(str(value) for value in choice["enum"] if value is not None)
    if "minimum" in choice:
        return f"{choice['type']} {choice['minimum']:,} to {choice['maximum']:,}"
    return "" if choice.get("type") == "null" else str(choice.get("format", choice.get("type", "")))


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def row(cells: tuple[Any, ...], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
