"""A worker: one accelerator, one copy of the model, and the threads that generate images with it.

    async for event in worker.generate(job): ...     many concurrently; closing the iterator cancels the job

    event loop        admission, events                  never computes
    decode-loop       steps the decoder (serve/worker/decode_loop.py)
    postprocessing    VQGAN, KoCLIP (serve/worker/postprocessing.py)
    encoder           PNG, WebP, JPEG

The same class works in one process with the HTTP server (serve/local_pool.py) and as a Ray Serve replica
(serve/cluster/replicas.py). A job's result is a function of the job and the model alone: neither the worker nor the other
jobs in the batch change a byte (on a CPU in float32 and 8 bits; see engine/decoding/slot_decoder.py).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path

import torch

from engine.device import fit_to_machine, pick_device
from engine.errors import InputError
from engine.files import is_hub_name
from engine.models.folder_config import model_digest
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker
from engine.pipeline.local_folder import local_folder
from engine.pipeline.pipeline import Pipeline
from serve.messages import EmbeddingJob, Embeddings, Finished, GenerationEvent, GenerationJob, ModelInfo, Refused
from serve.metrics import WorkerMetrics
from serve.scheduling.tickets import DeadlineTooShort, QueueFull
from serve.settings import ServeSettings
from serve.worker.content_credentials import ContentCredentials
from serve.worker.decode_loop import DecodeLoop
from serve.worker.embedding import Embedder
from serve.worker.postprocessing import Postprocessor, prepare
from serve.worker.request_state import RequestState

_SLOTS_CPU, _SLOTS_CUDA = 32, 256
# An iteration of the decode loop is a step and at most one prefill; one that takes longer hangs.
_STUCK_AFTER_S = 60.0
_DRAIN_POLL_S = 0.05

log = logging.getLogger(__name__)


class WorkerFailed(RuntimeError):
    """The worker cannot generate any more and must be replaced."""


class Worker:
    """Loads the model, starts the threads and warms up; `close` stops the threads.

    Raises:
        InputError: no such model or device, weights of the wrong shape, int8 where it is not supported, a key that does not
            sign.
    """

    def __init__(self, settings: ServeSettings) -> None:
        fit_to_machine()
        folder = local_folder(settings.model)
        self.pipeline = Pipeline.from_pretrained(
            folder, device=pick_device(settings.device), int8=settings.int8, weights=settings.weights
        )
        self.info = model_info(self.pipeline, folder, name=settings.model_id or _name(settings.model))
        is_cuda = self.pipeline.device.type == "cuda"
        self.num_slots = settings.num_slots or (_SLOTS_CUDA if is_cuda else _SLOTS_CPU)
        self._metrics = WorkerMetrics(num_slots=self.num_slots)
        self._postprocessor = Postprocessor(
            self.pipeline,
            self.info,
            self._metrics,
            visible_mark=settings.visible_mark,
            credentials=_credentials(settings),
        )
        self._embedder = Embedder(self.pipeline, self.info, self._postprocessor)
        self._decode_loop = DecodeLoop(
            self.pipeline,
            num_slots=self.num_slots,
            max_queued_sequences=settings.max_queued_sequences,
            metrics=self._metrics,
            postprocessor=self._postprocessor,
        )
        if is_cuda:
            self._capture_codec()
        self._states: set[RequestState] = set()
        self.is_draining = False
        self._postprocessor.start()
        self._decode_loop.start()

    def _capture_codec(self) -> None:
        """Captures the codec's and the ranker's graphs before there are other threads, and before the first request."""
        pipeline = self.pipeline
        with torch.inference_mode():
            tokens = torch.zeros(1, self.info.grid_size**2, dtype=torch.int64, device=pipeline.device)
            pipeline.rank_scores(["."], pipeline.decode_images(tokens)[None])

    async def generate(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        """A job's events; the last is `Finished` or `Refused`. Closing the iterator frees the job's slots at once."""
        arrived_s = time.monotonic()
        if self.is_draining:
            yield Refused("draining", retry_after_s=1.0)
            return
        refused = self._invalid(job)
        if refused is not None:
            yield refused
            return
        try:
            state = self._state(job, arrived_s)
        except InputError as error:
            yield Refused("invalid", f"{error.value}: {error.remedy}", param=error.field)
            return
        try:
            place = self._decode_loop.submit(state)
        except (QueueFull, DeadlineTooShort) as full:
            reason = "queue_full" if isinstance(full, QueueFull) else "deadline_unreachable"
            self._metrics.count_rejected(reason)
            yield Refused("queue_full", retry_after_s=full.retry_after_s)
            return
        self._states.add(state)
        try:
            if job.init_image is not None:
                self._postprocessor.prepare(state)
            if place is not None and job.wants_progress:
                yield place
            while True:
                event = await state.events.get()
                if isinstance(event, Refused) and event.reason == "deadline":
                    self._metrics.count_rejected("deadline")
                yield event
                if isinstance(event, Finished | Refused):
                    return
        finally:
            self._states.discard(state)
            if not state.is_over:
                state.is_over = True
                self._metrics.count_cancelled()
            self._decode_loop.cancel(state)

    async def embed(self, job: EmbeddingJob) -> Embeddings | Refused:
        """KoCLIP's embeddings of a job's captions and pictures."""
        return Refused("draining", retry_after_s=1.0) if self.is_draining else await self._embedder.embed(job)

    def _state(self, job: GenerationJob, arrived_s: float) -> RequestState:
        """Raises InputError: a job that the pipeline refuses, without an init image; that one is encoded later."""
        state = RequestState(job, Future(), asyncio.get_running_loop(), arrived_s)
        if job.init_image is None:
            state.prepared.set_result(prepare(self.pipeline, job))
        return state

    def _invalid(self, job: GenerationJob) -> Refused | None:
        """Refusal of a job that can never run. API servers check the same; one of another version may not."""
        if 1 + job.sampling_params.is_guided > self.num_slots:
            return Refused("invalid", "this server has one slot, and guidance needs two", param="guidance")
        return None

    @property
    def slots_in_use(self) -> int:
        return self._decode_loop.scheduler.slots_in_use

    @property
    def queued_sequences(self) -> int:
        return self._decode_loop.scheduler.queued_sequences

    @property
    def num_active(self) -> int:
        """Jobs that have not ended."""
        return len(self._states)

    def metrics_text(self) -> str:
        """Prometheus exposition of this worker."""
        return self._metrics.text()

    def check_health(self) -> None:
        """Raises WorkerFailed if a thread has died or hangs."""
        failure = self._decode_loop.failure or self._postprocessor.failure
        if failure is not None:
            raise WorkerFailed(f"a worker thread died: {type(failure).__name__}") from failure
        silent_s = time.monotonic() - self._decode_loop.last_iteration_s
        if silent_s > _STUCK_AFTER_S:
            raise WorkerFailed(f"the decode loop has not finished an iteration for {silent_s:.0f} s")

    async def drain(self) -> None:
        """Refuses new jobs and waits until the accepted ones have ended."""
        self.is_draining = True
        while self._states or self._embedder.num_waiting:
            await asyncio.sleep(_DRAIN_POLL_S)

    def close(self) -> None:
        """Stops the threads; unfinished jobs are refused."""
        self.is_draining = True
        self._decode_loop.stop()
        self._postprocessor.stop()
        for state in list(self._states):
            state.emit(Refused("failed", "the worker stopped"))


def _credentials(settings: ServeSettings) -> ContentCredentials | None:
    """Raises InputError: files that cannot sign."""
    if not settings.c2pa_key:
        return None
    return ContentCredentials(Path(settings.c2pa_certificates), Path(settings.c2pa_key))


def model_info(pipeline: Pipeline, folder: Path, *, name: str) -> ModelInfo:
    """Description of a model for API servers and clients."""
    device = pipeline.device
    return ModelInfo(
        model_id=name,
        created=int((folder / "config.json").stat().st_mtime),
        digest=model_digest(folder),
        image_size=pipeline.vqgan.config.image_size,
        grid_size=pipeline.vqgan.config.grid_size,
        text_seq_len=pipeline.transformer.config.text_seq_len,
        num_parameters=sum(parameter.numel() for parameter in pipeline.transformer.parameters()),
        has_ranker=pipeline.koclip is not None,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        tokenizer_json=pipeline.tokenizer.to_json(),
        default_sampling_params=pipeline.default_sampling_params,
        caption_guide=pipeline.caption_guide,
        embedding_width=_embedding_width(pipeline.koclip),
        has_ranker_tokenizer=pipeline.ranker_tokenizer is not pipeline.tokenizer,
        ground=pipeline.ground,
    )


def _embedding_width(ranker: Ranker | None) -> int:
    """0 without a ranker, and with one whose captions and pictures are not single vectors of one space."""
    if ranker is None:
        return 0
    if isinstance(ranker, KoClip) and (ranker.config.token_similarity or ranker.config.direction_projections):
        return 0
    return ranker.config.embed_dim


def _name(model: str) -> str:
    """A model's name in the API: of `runs/demo/kodalle/model` it is kodalle."""
    path = Path(model)
    if not path.exists() and is_hub_name(model):
        return model
    path = path.resolve()
    return path.parent.name if path.name in ("model", "model-best") else path.name
