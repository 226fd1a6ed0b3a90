"""The HTTP application: its routes, and the way of a request from its bytes to a worker and back.

    bytes ─► body | forms ─► schemas ─► uploads ─► rate limit ─► GenerationJob ─► pool ─► answers | streaming ─► bytes

The same application runs under plain uvicorn and inside a Ray Serve ingress; what it draws with is a `WorkerPool`.
Bodies are read by serve/api/body.py and not by FastAPI, whose own reader has no limits and whose own validation answers in
another shape; FastAPI routes, and publishes what serve/api/openapi.py says.

No torch, no ray: it imports in half a second.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer

from serve.api import schemas
from serve.api.body import read_json
from serve.api.errors import Failure
from serve.api.forms import closing_form, read_form
from serve.api.keys import KeyRing
from serve.api.middleware import Guard, RequestRecord
from serve.api.openapi import describe, described_page
from serve.api.page_files import add_page
from serve.api.responses import AnswerStyle, Route, answer_body
from serve.api.schemas import EditRequest, GenerationRequest, ImageRequest, TokenizeRequest
from serve.api.streaming import EventStream, finished_job
from serve.api.uploads import UploadReader
from serve.messages import Finished, GenerationJob, ModelInfo
from serve.metrics import CONTENT_TYPE, ApiMetrics, merge_expositions
from serve.pool import WorkerPool
from serve.settings import ServeSettings

_NO_STORE = {"cache-control": "no-store"}
# Fewer bytes are made into JSON in less time than a thread takes to start on them.
_IN_A_THREAD_BYTES = 256 * 1024


def build_api(pool: WorkerPool, settings: ServeSettings, *, replica: str = "edge") -> FastAPI:
    """The application, its counts in `app.state.metrics`.

    Args:
        replica: its name among the figures of GET /metrics, the same whichever edge is asked for them.

    Raises:
        InputError: the keys file cannot be read.
    """
    keys = KeyRing.read(Path(settings.keys_file)) if settings.keys_file else None
    api_server = _Edge(pool, settings, replica)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each broken form, at anybody's bidding

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with api_server.uploads:
            yield

    app = FastAPI(
        title="KoDALLE", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.metrics = api_server.metrics
    for path, method, endpoint in api_server.routes():
        methods = [method, "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, endpoint, methods=methods, response_model=None, include_in_schema=False)
    if settings.page:
        add_page(app)
    app.add_exception_handler(Failure, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_middleware(Guard, metrics=api_server.metrics, keys=keys)
    return app


class _Edge:
    """What the handlers share."""

    def __init__(self, pool: WorkerPool, settings: ServeSettings, replica: str) -> None:
        self.metrics = ApiMetrics()
        self.uploads = UploadReader(settings.limits)
        self._pool, self._settings, self._replica = pool, settings, replica

    def routes(self) -> list[tuple[str, str, Any]]:
        return [
            ("/v1/images/generations", "POST", self.generations),
            ("/v1/images/edits", "POST", self.edits),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{model_id:path}", "GET", self.one_model),
            ("/v1/tokenize", "POST", self.tokenize),
            ("/healthz", "GET", self.healthz),
            ("/readyz", "GET", self.readyz),
            ("/metrics", "GET", self.merged_metrics),
            ("/openapi.json", "GET", self.openapi),
            ("/docs", "GET", self.docs),
        ]

    # ------------------------------------------------------------------------------------------------------- drawing

    async def generations(self, request: Request) -> Response:
        asked = schemas.read_request(GenerationRequest, await self._json(request))
        info = await self._pool.model_info()
        return await self._draw(
            request, self._job(request, asked, info), asked, _style(request, info, "image_generation")
        )

    async def edits(self, request: Request) -> Response:
        limits = self._settings.limits
        form = await read_form(
            request.receive, request.headers, max_bytes=limits.max_edit_bytes, timeout_s=limits.body_timeout_s
        )
        with closing_form(form):
            asked = schemas.read_text_request(EditRequest, form.fields)
            info = await self._pool.model_info()
            job = self._job(request, asked, info, has_picture=True)
            init_image = await self.uploads.read(form.files, asked, info)
        job = replace(job, init_image=init_image, deadline_s=self._left_s(request))
        return await self._draw(request, job, asked, _style(request, info, "image_edit"))

    def _job(
        self, request: Request, asked: ImageRequest, info: ModelInfo, *, has_picture: bool = False
    ) -> GenerationJob:
        record: RequestRecord = request.state.record
        job = schemas.draw_job(
            asked,
            info,
            self._settings,
            request_id=record.job_id,
            key_id=record.caller.key_id,
            deadline_s=self._left_s(request),
            has_picture=has_picture,
        )
        record.noted = {"n": job.num_images, "candidates": job.num_candidates, "stream": bool(asked.stream)}
        if self._settings.log_prompts:
            record.noted["prompt"] = job.caption
        return job

    async def _draw(self, request: Request, job: GenerationJob, asked: ImageRequest, style: AnswerStyle) -> Response:
        record: RequestRecord = request.state.record
        await self._take(record, cost=job.num_candidates)
        ends_at = self._ends_at(request)
        count = partial(self._count, job)
        if asked.stream:
            return EventStream(
                self._pool, job, style, ends_at=ends_at, on_finished=count, on_failure=record.note_failure
            )
        finished = await finished_job(self._pool, job, receive=request.receive, ends_at=ends_at)
        count(finished)
        return Response(await _encoded(job, finished, style), media_type="application/json", headers=_NO_STORE)

    def _ends_at(self, request: Request) -> float:
        record: RequestRecord = request.state.record
        return record.arrived_at + self._settings.deadline_s

    def _left_s(self, request: Request) -> float:
        return max(0.0, self._ends_at(request) - asyncio.get_running_loop().time())

    async def _json(self, request: Request) -> dict[str, Any]:
        limits = self._settings.limits
        return await read_json(
            request.receive, request.headers, max_bytes=limits.max_json_bytes, timeout_s=limits.body_timeout_s
        )

    async def _take(self, record: RequestRecord, *, cost: float) -> None:
        """Counts `cost` pictures against the key's rate; raises Failure where it is used up."""
        key = record.caller.key
        if key is None or key.per_minute is None:
            return
        wait_s = await self._pool.take(key.key_id, key.per_minute, cost)
        if wait_s > 0:
            told = f"The key may draw {key.per_minute:g} pictures a minute, candidates included."
            told_ko = f"이 키는 분당 {key.per_minute:g}장까지 그릴 수 있습니다(후보 포함)."
            raise Failure("rate_limit_exceeded", told, told_ko, retry_after_s=wait_s)

    def _count(self, job: GenerationJob, finished: Finished) -> None:
        self.metrics.count_drawing(job.num_images, finished.timings_s)

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
        asked = schemas.read_request(TokenizeRequest, await self._json(request))
        prompt = schemas.checked_prompt(asked.prompt, self._settings.limits)
        info = await self._pool.model_info()
        count = len(_tokenizer(info.tokenizer_json).encode(prompt).ids)
        told = {"object": "tokens", "tokens": count, "limit": info.text_seq_len, "characters": len(prompt)}
        return JSONResponse(told, headers=_NO_STORE)

    # -------------------------------------------------------------------------------------------------- the operator

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=_NO_STORE)

    async def readyz(self, _: Request) -> Response:
        if not await self._pool.ready():
            raise Failure("unavailable", retry_after_s=1)
        return JSONResponse({"status": "ready"}, headers=_NO_STORE)

    async def merged_metrics(self, _: Request) -> Response:
        texts = {self._replica: self.metrics.text(), "worker": await self._pool.metrics_text()}
        text = await asyncio.to_thread(merge_expositions, texts)
        return Response(text, headers=_NO_STORE | {"content-type": CONTENT_TYPE})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(describe(self._settings, await self._pool.model_info()), headers=_NO_STORE)

    async def docs(self, _: Request) -> Response:
        page = described_page(describe(self._settings, await self._pool.model_info()))
        return Response(page, media_type="text/html", headers=_NO_STORE)


def _style(request: Request, info: ModelInfo, route: Route) -> AnswerStyle:
    return AnswerStyle(
        route=route,
        request_id=request.state.record.request_id,
        model_id=info.model_id,
        image_size=info.image_size,
        image_tokens_given=info.grid_size**2 if route == "image_edit" else 0,
    )


async def _encoded(job: GenerationJob, finished: Finished, style: AnswerStyle) -> bytes:
    size_bytes = sum(len(image.data or b"") for image in finished.images)
    if size_bytes < _IN_A_THREAD_BYTES:
        return answer_body(job, finished, style)
    return await asyncio.to_thread(answer_body, job, finished, style)


def _model_card(info: ModelInfo, settings: ServeSettings) -> dict[str, Any]:
    """OpenAI's four fields, and what a program or the page must know to ask for something that fits."""
    limits = settings.limits
    return {
        "id": info.model_id,
        "object": "model",
        "created": info.created,
        "owned_by": "kodalle",
        "image_size": info.image_size,
        "grid_size": info.grid_size,
        "text_seq_len": info.text_seq_len,
        "num_parameters": info.num_parameters,
        "has_ranker": info.has_ranker,
        "device": info.device,
        "digest": info.digest,
        "default_candidates": min(settings.default_candidates, limits.max_candidates),
        "default_sampling_params": info.default_sampling_params.generation_values(),
        "sampling_params": schemas.parameter_limits(limits),
        "attributes": info.attributes,
        "limits": {
            "prompt_characters": limits.max_prompt_characters,
            "images": limits.max_images,
            "candidates": limits.max_candidates,
            "partial_images": limits.max_partials,
            "edit_bytes": limits.max_edit_bytes,
            "pixels": limits.max_pixels,
            "deadline_s": settings.deadline_s,
        },
    }


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


async def _answer_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    request.state.record.note_failure(error)
    return Response(error.body(), status_code=error.status, headers=error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return await _answer_failure(request, Failure(code, headers=dict(error.headers or {})))
