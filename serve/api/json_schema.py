"""The commonest pieces of the OpenAPI document's schemas."""

from typing import Any

Json = dict[str, Any]

DATA_URL: Json = {
    "type": "string",
    "format": "image-data-url",
    "description": "data:image/png;base64,… of a PNG, WebP or JPEG; no other URL is fetched",
}
WHOLE: Json = {"type": "integer"}
TEXT: Json = {"type": "string"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
TEXTS: Json = {"type": "array", "items": TEXT}
NUMBER: Json = {"type": "number"}
NUMBER_OR_NULL: Json = {"type": ["number", "null"]}
NO_NUL = r"^[^\u0000]*$"


def object_of(properties: Json, **optional: Json) -> Json:
    """The schema of an object, all of whose properties but the optional ones are required."""
    return {"type": "object", "properties": properties | optional, "required": list(properties)}


def ref(name: str) -> Json:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}
