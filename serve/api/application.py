"""The HTTP application: routes, and the path of a request from its bytes to a worker and back.

    bytes ─► body | forms ─► schemas ─► rate limit ─► uploads ─► GenerationJob ─► pool ─► responses | streaming ─► bytes

The same application runs under plain uvicorn and inside a Ray Serve ingress; it generates through a `WorkerPool`. Bodies
are read by serve/api/body.py and not by FastAPI, whose reader has no limits and whose validation errors have another shape;
FastAPI only routes. The OpenAPI document is that of serve/api/openapi.py.

No torch, no ray: it imports in half a second.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from engine.data.caption_guide import CaptionGuide
from engine.data.prompt_words import PromptReader, PromptWords
from engine.pipeline.init_image import InitImage
from serve.api import schemas
from serve.api.body import content_type, read_json
from serve.api.embeddings import (
    COST,
    EmbeddingsRequest,
    Item,
    RerankRequest,
    check_ranker,
    embeddings_body,
    read_items,
    rerank_body,
)
from serve.api.errors import Failure, refusal
from serve.api.forms import closing_form, read_form
from serve.api.keys import KeyRing
from serve.api.middleware import ApiMiddleware, RequestRecord
from serve.api.openapi import describe
from serve.api.openapi_page import described_page
from serve.api.page_files import add_page
from serve.api.renditions import check_init_ground, size_bounds
from serve.api.responses import Operation, ResponseContext, response_body, unknown_fields
from serve.api.schemas import EditJsonRequest, EditRequest, GenerationRequest, ImageRequest, TokenizeRequest
from serve.api.streaming import EventStream, answered, finished_job
from serve.api.uploads import FILE_PARTS, UploadReader, check_no_file_is_text
from serve.api.validation import read_request, read_text_request
from serve.messages import EmbeddingJob, Embeddings, Finished, GenerationJob, ModelInfo, Refused
from serve.metrics import CONTENT_TYPE, ApiMetrics, merge_expositions
from serve.pool import WorkerPool
from serve.settings import ServeSettings

_NO_STORE = {"cache-control": "no-store"}
# Below this size encoding JSON takes less time than handing it to a thread.
_IN_A_THREAD_BYTES = 256 * 1024


def build_api(pool: WorkerPool, settings: ServeSettings, *, replica: str = "api-server") -> FastAPI:
    """The application, with its metrics in `app.state.metrics`.

    Args:
        replica: its `replica` label in GET /metrics, the same at whichever API server they are read.

    Raises:
        InputError: the keys file cannot be read.
    """
    handlers = _Handlers(pool, settings, replica)
    logging.getLogger("python_multipart").setLevel(
        logging.ERROR
    )  # any client could flood the log: it warns of each malformed form

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with handlers.uploads:
            yield

    app = FastAPI(
        title="KoDALLE", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.metrics = handlers.metrics
    for path, method, endpoint in handlers.routes():
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, endpoint, methods=methods, response_model=None, include_in_schema=False)
    if settings.page:
        add_page(app)
    app.add_exception_handler(Failure, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_middleware(
        ApiMiddleware,
        metrics=handlers.metrics,
        keys=handlers.keys,
        origins=settings.allowed_origins,
        root_path=settings.root_path,
    )
    return app


class _Handlers:
    """Handlers of all routes, and the state that they share."""

    def __init__(self, pool: WorkerPool, settings: ServeSettings, replica: str) -> None:
        self.metrics = ApiMetrics()
        self.uploads = UploadReader(settings.limits)
        self.keys = KeyRing.read(Path(settings.keys_file)) if settings.keys_file else None
        self._pool, self._settings, self._replica = pool, settings, replica
        self._reader: tuple[tuple[str, CaptionGuide], PromptReader] | None = None  # of that tokenizer and guide

    def routes(self) -> list[tuple[str, str, Any]]:
        return [
            ("/v1/images/generations", "POST", self.generations),
            ("/v1/images/edits", "POST", self.edits),
            ("/v1/embeddings", "POST", self.embeddings),
            ("/v1/rerank", "POST", self.rerank),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{model_id:path}", "GET", self.one_model),
            ("/v1/tokenize", "POST", self.tokenize),
            ("/healthz", "GET", self.healthz),
            ("/readyz", "GET", self.readyz),
            ("/metrics", "GET", self.merged_metrics),
            ("/openapi.json", "GET", self.openapi),
            ("/docs", "GET", self.docs),
        ]

    # ---------------------------------------------------------------------------------------------------- generation

    async def generations(self, request: Request) -> Response:
        body = read_request(GenerationRequest, await self._json(request))
        info = await self._pool.model_info()
        job = await self._job(request, body, info)
        return await self._generate(request, job, body, self._context(request, job, info, "image_generation"))

    async def edits(self, request: Request) -> Response:
        limits = self._settings.limits
        if content_type(request.headers, "multipart/form-data", "application/json")[0] == "application/json":
            return await self._json_edit(request)
        form = await read_form(
            request.receive, request.headers, max_bytes=limits.max_edit_bytes, timeout_s=limits.body_timeout_s
        )
        with closing_form(form):
            fields = {name: text for name, text in form.fields.items() if text or name not in FILE_PARTS}
            check_no_file_is_text(fields)
            body = read_text_request(EditRequest, fields)
            info = await self._pool.model_info()
            job = await self._job(request, body, info, has_init_image=True)
            init_image = await self.uploads.read(form.files, body, info, left_s=self._left_s(request))
        return await self._edit(request, job, body, info, init_image)

    async def _json_edit(self, request: Request) -> Response:
        body = read_request(EditJsonRequest, await self._json_with_pictures(request))
        info = await self._pool.model_info()
        job = await self._job(request, body, info, has_init_image=True)
        files = await asyncio.to_thread(body.files)
        init_image = await self.uploads.read(files, body, info, left_s=self._left_s(request))
        return await self._edit(request, job, body, info, init_image)

    async def _edit(
        self, request: Request, job: GenerationJob, body: EditRequest, info: ModelInfo, init_image: InitImage
    ) -> Response:
        check_init_ground(job.rendition, init_image, info)
        job = replace(job, init_image=init_image, deadline_s=self._left_s(request))
        return await self._generate(request, job, body, self._context(request, job, info, "image_edit"))

    async def _job(
        self, request: Request, body: ImageRequest, info: ModelInfo, *, has_init_image: bool = False
    ) -> GenerationJob:
        """The request's job, taken from its key's rate limit, before anything is decoded for it."""
        record: RequestRecord = request.state.record
        job = schemas.generation_job(
            body,
            info,
            self._settings,
            request_id=record.job_id,
            key_id=record.caller.key_id,
            deadline_s=self._left_s(request),
            has_init_image=has_init_image,
        )
        record.details = {"n": job.num_images, "candidates": job.num_candidates, "stream": bool(body.stream)}
        if self._settings.log_prompts:
            record.details["prompt"] = job.caption
        if self._settings.strict if body.strict is None else body.strict:
            words = self._words(info, job.caption)
            if not words.all_known:
                raise schemas.unknown_words(words)
        await self._take_rate(record, cost=job.num_candidates)
        return job

    def _context(self, request: Request, job: GenerationJob, info: ModelInfo, operation: Operation) -> ResponseContext:
        return ResponseContext(
            operation=operation,
            request_id=request.state.record.request_id,
            model_id=info.model_id,
            image_size=info.image_size,
            init_image_tokens=info.grid_size**2 if operation == "image_edit" else 0,
            words=self._words(info, job.caption),
        )

    def _words(self, info: ModelInfo, prompt: str) -> PromptWords:
        model = (info.tokenizer_json, info.caption_guide)
        if self._reader is None or self._reader[0] != model:
            self._reader = model, PromptReader(*model)
        return self._reader[1].read(prompt)

    async def _generate(
        self, request: Request, job: GenerationJob, body: ImageRequest, context: ResponseContext
    ) -> Response:
        record: RequestRecord = request.state.record
        ends_at = self._ends_at(request)
        count = partial(self._count, job)
        if body.stream:
            return EventStream(
                self._pool, job, context, ends_at=ends_at, on_finished=count, on_failure=record.note_failure
            )
        finished = await finished_job(self._pool, job, receive=request.receive, ends_at=ends_at)
        count(finished)
        return Response(
            await _encode_response(job, finished, context), media_type="application/json", headers=_NO_STORE
        )

    def _ends_at(self, request: Request) -> float:
        record: RequestRecord = request.state.record
        return record.arrived_at + self._settings.deadline_s

    def _left_s(self, request: Request) -> float:
        return max(0.0, self._ends_at(request) - asyncio.get_running_loop().time())

    async def _json(self, request: Request, *, max_bytes: int | None = None) -> dict[str, Any]:
        """The body's object; `max_bytes` None: the limit of bodies without pictures."""
        limits = self._settings.limits
        most = max_bytes or limits.max_json_bytes
        return await read_json(request.receive, request.headers, max_bytes=most, timeout_s=limits.body_timeout_s)

    async def _take_rate(self, record: RequestRecord, *, cost: float) -> None:
        """Takes `cost` images from the key's rate limit; raises Failure when it is exhausted."""
        key = record.caller.key
        if key is None or key.per_minute is None:
            return
        wait_s = await self._pool.take(key.key_id, key.per_minute, cost)
        if wait_s > 0:
            detail = f"The key's limit is {key.per_minute:g} images a minute, candidates included."
            detail_ko = f"이 키는 분당 이미지 {key.per_minute:g}장까지 생성할 수 있습니다(후보 포함)."
            raise Failure("rate_limit_exceeded", detail, detail_ko, retry_after_s=wait_s)

    def _count(self, job: GenerationJob, finished: Finished) -> None:
        self.metrics.count_generation(job.num_images, finished.timings_s)

    # --------------------------------------------------------------------------------------------------------- search

    async def embeddings(self, request: Request) -> Response:
        body = read_request(EmbeddingsRequest, await self._json_with_pictures(request))
        items = read_items(body.input, "input", self._settings.limits)
        info = await self._pool.model_info()
        check_ranker(body.model, body.dimensions, info)
        found = await self._embed(request, items, info)
        return JSONResponse(embeddings_body(body, found, info, words=self._words_of(items, info)), headers=_NO_STORE)

    async def rerank(self, request: Request) -> Response:
        body = read_request(RerankRequest, await self._json_with_pictures(request))
        if isinstance(body.query, list):
            raise Failure("invalid_type", "`query` must be one.", "`query`는 하나여야 합니다.", param="query")
        limits = self._settings.limits
        items = read_items(body.query, "query", limits)
        items += read_items(
            body.documents if isinstance(body.documents, list) else [body.documents], "documents", limits
        )
        info = await self._pool.model_info()
        check_ranker(body.model, None, info)
        found = await self._embed(request, items, info, scores_first=True)
        request_id = request.state.record.request_id
        words = self._words_of(items, info)
        answer = rerank_body(body, items[1:], found, info, words=words, request_id=request_id)
        return JSONResponse(answer, headers=_NO_STORE)

    def _words_of(self, items: Sequence[Item], info: ModelInfo) -> list[PromptWords]:
        """Of captions; none with a ranker that has a tokenizer of its own, of bytes, which knows every word."""
        if info.has_ranker_tokenizer:
            return []
        return [self._words(info, item.caption) for item in items if item.caption]

    async def _embed(
        self, request: Request, items: Sequence[Item], info: ModelInfo, *, scores_first: bool = False
    ) -> Embeddings:
        record: RequestRecord = request.state.record
        record.details = {"items": len(items)}
        await self._take_rate(record, cost=COST * len(items))

        async def embedded() -> Embeddings | Refused:
            data_urls = {item.param: item.data_url for item in items if item.data_url}
            pictures = await self.uploads.read_pictures(data_urls, info, left_s=self._left_s(request))
            inputs = tuple(pictures.get(item.param, item.caption) for item in items)
            return await self._pool.embed(EmbeddingJob(record.job_id, inputs, scores_first))

        found = await answered(embedded(), receive=request.receive, ends_at=self._ends_at(request))
        if isinstance(found, Refused):
            raise refusal(found)
        self.metrics.embeddings.inc(len(items))
        return found

    async def _json_with_pictures(self, request: Request) -> dict[str, Any]:
        return await self._json(request, max_bytes=self._settings.limits.max_edit_bytes)

    # ---------------------------------------------------------------------------------------------------- the model

    async def models(self, _: Request) -> Response:
        card = _model_card(await self._pool.model_info(), self._settings)
        return JSONResponse({"object": "list", "data": [card]}, headers=_NO_STORE)

    async def one_model(self, request: Request) -> Response:
        info = await self._pool.model_info()
        if request.path_params["model_id"] != info.model_id:
            raise schemas.model_not_found(info)
        return JSONResponse(_model_card(info, self._settings), headers=_NO_STORE)

    async def tokenize(self, request: Request) -> Response:
        body = read_request(TokenizeRequest, await self._json(request))
        prompt = schemas.checked_prompt(body.prompt, self._settings.limits)
        info = await self._pool.model_info()
        words = self._words(info, prompt)
        answer = {"object": "tokens", "tokens": words.count, "limit": info.text_seq_len, "characters": len(prompt)}
        answer |= unknown_fields(words) | {"unknown": [asdict(one) for one in words.unknown]}
        return JSONResponse(answer, headers=_NO_STORE)

    # ------------------------------------------------------------------------------------------------------ operation

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=_NO_STORE)

    async def readyz(self, _: Request) -> Response:
        if (self.keys is not None and self.keys.is_outdated()) or not await self._pool.ready():
            raise Failure("unavailable", retry_after_s=1)
        return JSONResponse({"status": "ready"}, headers=_NO_STORE)

    async def merged_metrics(self, _: Request) -> Response:
        texts = {self._replica: self.metrics.text(), "worker": await self._pool.metrics_text()}
        text = await asyncio.to_thread(merge_expositions, texts)
        return Response(text, headers=_NO_STORE | {"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        info = await self._pool.model_info()
        return JSONResponse(describe(self._settings, info, root_path=request.scope["root_path"]), headers=_NO_STORE)

    async def docs(self, _: Request) -> Response:
        page = described_page(describe(self._settings, await self._pool.model_info()))
        return Response(page, media_type="text/html", headers=_NO_STORE)


async def _encode_response(job: GenerationJob, finished: Finished, context: ResponseContext) -> bytes:
    size_bytes = sum(len(image.data or b"") for image in finished.images)
    if size_bytes < _IN_A_THREAD_BYTES:
        return response_body(job, finished, context)
    return await asyncio.to_thread(response_body, job, finished, context)


def _model_card(info: ModelInfo, settings: ServeSettings) -> dict[str, Any]:
    """OpenAI's four fields of a model, and what a client needs to know to send valid requests."""
    limits = settings.limits
    return {
        "id": info.model_id,
        "object": "model",
        "created": info.created,
        "owned_by": "kodalle",
        "image_size": info.image_size,
        "max_size": size_bounds(info, limits)[1],
        "transparent": info.ground is not None,
        "grid_size": info.grid_size,
        "text_seq_len": info.text_seq_len,
        "num_parameters": info.num_parameters,
        "has_ranker": info.has_ranker,
        "embedding_width": info.embedding_width,
        "device": info.device,
        "digest": info.digest,
        "default_candidates": min(settings.default_candidates, limits.max_candidates),
        "default_sampling_params": info.default_sampling_params.generation_values(),
        "sampling_params": schemas.parameter_limits(limits),
        # Without its words, which are thousands, and which /v1/tokenize knows.
        "caption_guide": info.caption_guide.model_dump(mode="json", exclude={"words"}),
        "limits": {
            "prompt_characters": limits.max_prompt_characters,
            "images": limits.max_images,
            "candidates": limits.max_candidates,
            "partial_images": limits.max_partials,
            "embeddings": limits.max_embeddings,
            "edit_bytes": limits.max_edit_bytes,
            "pixels": limits.max_pixels,
            "deadline_s": settings.deadline_s,
        },
    }


async def _answer_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    request.state.record.note_failure(error)
    return Response(error.body(), status_code=error.status, headers=error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Error object for the router's own errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return await _answer_failure(request, Failure(code, headers=dict(error.headers or {})))
