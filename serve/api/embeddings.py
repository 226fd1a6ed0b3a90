"""/v1/embeddings and /v1/rerank: KoCLIP's view of captions and pictures, for search.

Both take captions and pictures in one list, because KoCLIP has one space for both: a caption finds pictures, a picture finds
pictures. Embeddings have OpenAI's shape, base64 included, which its clients ask for by default; rerank has Jina's and Cohere's.

    a text or {"text": …}               a caption, as generation reads it
    {"image": "data:image/png;base64,…"}, or that URL as a text of its own        a picture

No torch, no ray. E width of KoCLIP's space.
"""

import base64
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.data.prompt_words import PromptWords
from serve.api.data_urls import is_data_url
from serve.api.errors import Failure, invalid_value
from serve.api.schemas import checked_prompt, model_not_found
from serve.messages import Embeddings, ModelInfo
from serve.settings import Limits

COST = 0.1  # of a caption or picture, in images of a key's rate limit


class EmbeddingsRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input: Any = Field(description="a caption or picture, or a list of them")
    model: str | None = Field(None, description="an id of /v1/models; default: the served model")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32; default float"
    )
    dimensions: int | None = Field(None, description="the width of the model's embeddings, or left out")
    user: str | None = Field(None, description="accepted for compatibility, without effect; never logged")


class RerankRequest(BaseModel):
    """Body of POST /v1/rerank."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: Any = Field(description="a caption or picture")
    documents: Any = Field(description="captions and pictures to order by their likeness to the query")
    model: str | None = Field(None, description="an id of /v1/models; default: the served model")
    top_n: int | None = Field(None, ge=1, description="results returned; default all")
    return_documents: bool | None = Field(None, description="repeat captions in the results; pictures never are")


@dataclass(frozen=True)
class Item:
    """A caption in its normal form, or a picture as a data URL; `param` is its place in the request."""

    param: str
    caption: str = ""
    data_url: str = ""


def read_items(value: Any, param: str, limits: Limits) -> list[Item]:
    """The captions and pictures of a field that holds one or a list of them.

    Raises:
        Failure: none, too many, tokens instead of texts, an empty caption or a bad one.
    """
    several = value if isinstance(value, list) else [value]
    if not several:
        raise invalid_value(param, "must not be empty", "비어 있습니다")
    if len(several) > limits.max_embeddings:
        detail = f"has {len(several)} entries: the limit is {limits.max_embeddings}"
        raise invalid_value(param, detail, f"최대 {limits.max_embeddings}개입니다")
    if isinstance(several[0], int | list):
        detail = (
            "holds tokens, which are numbers of another model: send texts (langchain: check_embedding_ctx_length=False)"
        )
        raise invalid_value(param, detail, "토큰 번호가 아니라 글을 보내 주세요")
    return [
        _item(one, param if several is not value else f"{param}[{number}]", limits)
        for number, one in enumerate(several)
    ]


def _item(value: Any, param: str, limits: Limits) -> Item:
    if isinstance(value, dict) and len(value) == 1:
        (kind, value), param = next(iter(value.items())), f"{param}.{next(iter(value))[:16]}"
        if kind == "image" and isinstance(value, str):
            return Item(param, data_url=value)
        if kind != "text":
            value = None
    elif isinstance(value, str) and is_data_url(value):
        return Item(param, data_url=value)
    if not isinstance(value, str):
        detail = f'`{param}` must be a text, {{"text": …}} or {{"image": "data:image/png;base64,…"}}.'
        raise Failure("invalid_type", detail, f"`{param}`: 글이나 이미지(data URL)여야 합니다.", param=param)
    caption = checked_prompt(value, limits, field=param)
    if not caption:
        raise invalid_value(param, "must not be an empty text", "빈 글은 쓸 수 없습니다")
    return Item(param, caption=caption)


def check_ranker(model: str | None, dimensions: int | None, info: ModelInfo) -> None:
    """Raises Failure: another model, one that embeds nothing, or another width than its embeddings have."""
    if model not in (None, info.model_id):
        raise model_not_found(info)
    if not info.embedding_width:
        detail = "This model has no ranker with one vector for a caption or picture, so it embeds nothing."
        raise Failure("unsupported_parameter", detail, "이 모델에는 임베딩을 만드는 KoCLIP이 없습니다.", param="model")
    if dimensions not in (None, info.embedding_width):
        width = info.embedding_width
        raise invalid_value(
            "dimensions", f"must be {width}, the model's width, or left out", f"이 모델은 {width}차원입니다"
        )


def embeddings_body(
    request: EmbeddingsRequest, found: Embeddings, info: ModelInfo, *, words: Sequence[PromptWords]
) -> dict[str, Any]:
    """The answer of /v1/embeddings; `words` are the captions'."""
    encode: Callable[[bytes], Any] = _as_base64 if request.encoding_format == "base64" else _as_floats
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(found.vectors)
    ]
    answer = {"object": "list", "data": data, "model": info.model_id}
    return answer | {"usage": _usage(found)} | _words(words, found)


def rerank_body(
    request: RerankRequest,
    documents: Sequence[Item],
    found: Embeddings,
    info: ModelInfo,
    *,
    words: Sequence[PromptWords],
    request_id: str,
) -> dict[str, Any]:
    """The answer of /v1/rerank: best first, equals in the order of the documents.

    Args:
        found: of the query and the documents; its scores are the documents'.
        words: of all captions.
    """
    order = sorted(range(len(documents)), key=lambda index: -found.scores[index])[: request.top_n]
    results = []
    for index in order:
        result: dict[str, Any] = {"index": index, "relevance_score": found.scores[index]}
        if request.return_documents and documents[index].caption:
            result["document"] = {"text": documents[index].caption}
        results.append(result)
    answer = {"id": request_id, "object": "list", "model": info.model_id, "results": results}
    return answer | {"usage": _usage(found)} | _words(words, found)


def _usage(found: Embeddings) -> dict[str, int]:
    return {"prompt_tokens": found.text_tokens, "total_tokens": found.text_tokens}


def _words(words: Sequence[PromptWords], found: Embeddings) -> dict[str, Any]:
    """What of the captions KoCLIP did not read, as answers of generation state it."""
    unknown = dict.fromkeys(word for one in words for word in one.words_unknown)
    num_tokens = sum(one.tokens_unknown for one in words)
    return {"tokens_cut": found.tokens_cut, "tokens_unknown": num_tokens, "words_unknown": list(unknown)}


def _as_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _as_floats(vector: bytes) -> list[float]:
    """Nine digits, which tell every float32 from every other."""
    return [float(f"{value:.9g}") for value in struct.unpack(f"<{len(vector) // 4}f", vector)]
