"""The OpenAPI 3.1 document of the API; serve/api/openapi_page.py shows it to people.

Written here and not derived by FastAPI, because the API does not use FastAPI's body reader, and because the document
contains the running server's limits. Field lists come from the models of serve/api/schemas.py, so they cannot differ from
what is validated.
"""

from collections.abc import Sequence

from pydantic import BaseModel

from engine.data.caption_guide import CaptionGuide
from engine.pipeline.provenance import Provenance
from engine.text import TEXT_PATTERN, VISIBLE_TEXT_PATTERN
from serve.api.errors import FAILURES
from serve.api.json_schema import (
    DATA_URL,
    NO_NUL,
    NUMBER,
    NUMBER_OR_NULL,
    TEXT,
    TEXT_OR_NULL,
    TEXTS,
    WHOLE,
    Json,
    object_of,
    ref,
)
from serve.api.openapi_search import search_schemas
from serve.api.renditions import size_bounds
from serve.api.schemas import EditJsonRequest, EditRequest, GenerationRequest, TokenizeRequest, bounds, spec_of
from serve.messages import ModelInfo
from serve.settings import ServeSettings

_IMAGE_PARTS: Json = {name: {"contentType": "image/png, image/webp, image/jpeg"} for name in ("image", "mask")}
_PARAMETER: Json = {
    "type": "object",
    "description": "a sampling parameter: values from minimum to maximum, and 0 where or_zero",
    "properties": {
        "type": {"enum": ["integer", "number"]},
        "minimum": NUMBER,
        "maximum": NUMBER,
        "or_zero": {"type": "boolean"},
        "description": TEXT,
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
    reranking = {"query": captions[0], "documents": list(captions)}
    model_id = {
        "name": "model_id", "in": "path", "required": True, "schema": TEXT, "example": info.model_id
    }  # fmt: skip
    return {
        "/v1/images/generations": {
            "post": _operation(
                "Generate images from a caption",
                "Images | SSE",
                _ACCESS + _BODY + _GENERATION,
                body={"application/json": {"schema": ref("GenerationRequest"), "examples": _examples(captions)}},
            )
        },
        "/v1/images/edits": {
            "post": _operation(
                "Inpaint the masked part of an image, or regenerate all but its upper rows",
                "Images | SSE",
                _ACCESS + _BODY + _GENERATION,
                body={
                    "multipart/form-data": {"schema": ref("EditRequest"), "encoding": _IMAGE_PARTS},
                    "application/json": {"schema": ref("EditJsonRequest")},
                },
            )
        },
        "/v1/embeddings": {
            "post": _operation(
                "KoCLIP embeddings of captions and pictures, in OpenAI's shape",
                "EmbeddingList",
                _ACCESS + _BODY + _GENERATION,
                body={"application/json": {"schema": ref("EmbeddingsRequest"), "example": {"input": list(captions)}}},
            )
        },
        "/v1/rerank": {
            "post": _operation(
                "Captions and pictures ordered by KoCLIP's score beside a query, in Jina's and Cohere's shape",
                "Ranking",
                _ACCESS + _BODY + _GENERATION,
                body={"application/json": {"schema": ref("RerankRequest"), "example": reranking}},
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
                body={"application/json": {"schema": ref("TokenizeRequest"), "example": {"prompt": captions[0]}}},
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
        content: Json = {"text/plain": {"schema": TEXT}}
    else:
        name = answer.partition(" | ")[0]
        content = {"application/json": {"schema": ref(name)} | ({"example": example} if example else {})}
        if answer.endswith("SSE"):
            content["text/event-stream"] = {"schema": ref("Event")}
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
_HEADERS: Json = {"x-request-id": {"description": "identifies the request in the server's log", "schema": TEXT}}


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
            "content": {"application/json": {"schema": ref("Error")}},
        }
        for status, names in sorted(by_status.items())
    }


def _schemas(settings: ServeSettings, info: ModelInfo) -> Json:
    image = {
        "b64_json": {"type": ["string", "null"]},
        "seed": WHOLE,
        "candidate": WHOLE,
        "rank": WHOLE,
        "clip_score": NUMBER_OR_NULL,
        "contrast": NUMBER_OR_NULL,
        "clip_score_percentile": NUMBER_OR_NULL,
        "log_likelihood": NUMBER_OR_NULL,
        "provenance": ref("Provenance"),
    }
    unknown = {"tokens_unknown": WHOLE, "words_unknown": TEXTS, "words_total": WHOLE, "words_known": WHOLE}
    details = object_of({"text_tokens": WHOLE, "image_tokens": WHOLE})
    usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), WHOLE)
    images = {
        "created": WHOLE,
        "data": {"type": "array", "items": ref("Image")},
        "background": {"enum": ["opaque", "transparent"]},
        "output_format": {"enum": ["png", "webp", "jpeg"]},
        "quality": {"enum": ["low", "medium", "high", "xhigh", "max"]},
        "size": TEXT,
        "enlarged_from": TEXT_OR_NULL,
        "usage": object_of(usage | {"input_tokens_details": details, "output_tokens_details": details}),
        "model": TEXT,
        "request_id": TEXT,
        "tokens_cut": WHOLE,
        **unknown,
        "timings_s": {"type": "object", "additionalProperties": NUMBER},
    }
    model = {
        "id": {"const": info.model_id},
        "object": {"const": "model"},
        "created": WHOLE,
        "default_candidates": WHOLE,
        "owned_by": TEXT,
        "digest": TEXT,
        "device": TEXT,
        "has_ranker": {"type": "boolean"},
        "transparent": {"type": "boolean"},
        "limits": {"type": "object", "additionalProperties": NUMBER},
        "default_sampling_params": {"type": "object", "additionalProperties": NUMBER_OR_NULL},
        "sampling_params": {"type": "object", "additionalProperties": _PARAMETER},
        "caption_guide": ref("CaptionGuide"),
    }
    whole = ("image_size", "max_size", "grid_size", "text_seq_len", "num_parameters", "embedding_width")
    guide = CaptionGuide.model_json_schema(ref_template=ref("{model}")["$ref"])
    del guide["properties"]["words"]  # not sent
    error = dict.fromkeys(("message", "message_ko", "type", "code"), TEXT) | {"param": {"type": ["string", "null"]}}
    return {
        "GenerationRequest": _fields(GenerationRequest, settings, info),
        "EditRequest": _with_files(_fields(EditRequest, settings, info)),
        "EditJsonRequest": _with_pictures(_fields(EditJsonRequest, settings, info)),
        "TokenizeRequest": _fields(TokenizeRequest, settings, info),
        **search_schemas(settings, info),
        "Image": object_of(image),
        **_provenance_schemas(),
        "Event": object_of({"event": {"enum": _EVENTS}, "data": TEXT | {"contentMediaType": "application/json"}}),
        "Images": object_of(images, candidates={"type": "array", "items": ref("Image")}),
        "Model": object_of(model | dict.fromkeys(whole, WHOLE)),
        **guide.pop("$defs"),
        "CaptionGuide": guide,
        "ModelList": object_of({"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}),
        "Tokens": object_of(
            {
                "object": {"const": "tokens"},
                "tokens": WHOLE,
                "limit": WHOLE,
                "characters": WHOLE,
                **unknown,
                "unknown": {"type": "array", "items": ref("UnknownWord")},
            }
        ),
        "UnknownWord": object_of(
            {"word": TEXT, "start": WHOLE, "end": WHOLE, "suggestion": TEXT_OR_NULL, "value": TEXT_OR_NULL}
        ),
        "Status": object_of({"status": TEXT}),
        "Error": object_of({"error": object_of(error)}),
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
        properties[name]["anyOf"][0]["pattern"] = NO_NUL
    if "changed_from" in properties:
        of_prompt = {name: properties["prompt"][name] for name in ("maxLength", "pattern")}
        properties["changed_from"]["anyOf"][0] |= of_prompt
    least, most = size_bounds(info, settings.limits)
    accepted: Json = {
        "model": info.model_id,
        "size": ["auto", *(f"{side}x{side}" for side in sorted({least, most}))],  # all squares between them, too
        "background": ["opaque", "auto", *(["transparent"] if info.ground else [])],
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


def _with_pictures(schema: Json) -> Json:
    """A JSON edit's schema: data URLs in the place of files."""
    del schema["$defs"]
    properties = schema["properties"]
    picture = object_of({"image_url": DATA_URL}) | {"additionalProperties": False}
    properties["images"] = {
        "type": "array",
        "items": picture,
        "minItems": 1,
        "maxItems": 1,
        "description": properties["images"]["description"],
    }
    properties["mask"] = {"anyOf": [picture, {"type": "null"}], "description": properties["mask"]["description"]}
    return schema
