"""Schemas of /v1/embeddings and /v1/rerank in the OpenAPI document."""

from pydantic import BaseModel

from engine.text import VISIBLE_TEXT_PATTERN
from serve.api.embeddings import EmbeddingsRequest, RerankRequest
from serve.api.json_schema import DATA_URL, NO_NUL, NUMBER, TEXT, TEXTS, WHOLE, Json, object_of
from serve.messages import ModelInfo
from serve.settings import ServeSettings


def search_schemas(settings: ServeSettings, info: ModelInfo) -> Json:
    """Requests and answers by name."""
    limits = settings.limits
    text = TEXT | {"maxLength": limits.max_prompt_characters, "pattern": VISIBLE_TEXT_PATTERN}
    closed = {"additionalProperties": False}
    item = {"anyOf": [text, object_of({"text": text}) | closed, object_of({"image": DATA_URL}) | closed]}
    items = {"type": "array", "items": item, "minItems": 1, "maxItems": limits.max_embeddings}
    model: Json = {"enum": [info.model_id, None]}
    fields: dict[type[BaseModel], Json] = {
        EmbeddingsRequest: {
            "input": {"anyOf": [*item["anyOf"], items]},
            "model": model,
            "dimensions": {"enum": [info.embedding_width, None]},
        },
        RerankRequest: {"query": item, "documents": items, "model": model},
    }
    found = {}
    for kind, known in fields.items():
        schema = kind.model_json_schema()
        schema.pop("description")
        for name, field in known.items():
            schema["properties"][name] = field | {"description": schema["properties"][name]["description"]}
        found[kind.__name__] = schema
    found["EmbeddingsRequest"]["properties"]["user"]["anyOf"][0]["pattern"] = NO_NUL
    usage = object_of(dict.fromkeys(("prompt_tokens", "total_tokens"), WHOLE))
    words = {"tokens_cut": WHOLE, "tokens_unknown": WHOLE, "words_unknown": TEXTS}
    vector = {"anyOf": [{"type": "array", "items": NUMBER}, TEXT | {"contentEncoding": "base64"}]}
    embedding = object_of({"object": {"const": "embedding"}, "index": WHOLE, "embedding": vector})
    result = object_of({"index": WHOLE, "relevance_score": NUMBER}, document=object_of({"text": TEXT}))
    shared = {"object": {"const": "list"}, "model": {"const": info.model_id}, "usage": usage} | words
    return found | {
        "EmbeddingList": object_of(shared | {"data": {"type": "array", "items": embedding}}),
        "Ranking": object_of(shared | {"id": TEXT, "results": {"type": "array", "items": result}}),
    }
