"""A worker: one accelerator, one copy of the model, and the threads that draw with it.

    async for event in worker.draw(job): ...     many at once; closing the iterator cancels the drawing

    event loop    admission, events                  never computes
    stepper       steps the decoder (serve/worker/decode_loop.py)
    pictures      VQGAN, KoCLIP (serve/worker/postprocessing.py)
    encoders      PNG, WebP, JPEG

The same worker works in one process with the HTTP server (serve/local_pool.py) and as a Ray Serve replica (serve/app.py).
What a job returns is a function of the job and the model alone: which worker drew it, and beside whom, changes no byte
(on a CPU in float32 and 8 bits; see engine/decoding/slot_decoder.py).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path

import torch

from engine.device import fit_threads, pick_device
from engine.errors import InputError
from engine.files import is_hub_name
from engine.models.folder import model_digest
from engine.pipeline.pipeline import Pipeline, local_folder
from serve.messages import Finished, GenerationEvent, GenerationJob, ModelInfo, Refused
from serve.metrics import WorkerMetrics
from serve.scheduling.scheduler import DeadlineTooShort, QueueFull
from serve.settings import ServeSettings
from serve.worker.decode_loop import DecodeLoop
from serve.worker.postprocessing import Postprocessor, prepare
from serve.worker.request_state import RequestState

_SLOTS_CPU, _SLOTS_CUDA = 32, 256
# A turn of the stepper is a step and at most one prefill; one that takes longer hangs.
_STUCK_AFTER_S = 60.0
_DRAIN_POLL_S = 0.05

log = logging.getLogger(__name__)


class WorkerFailed(RuntimeError):
    """The worker cannot draw any more and must be started anew."""


class Worker:
    """Loads the model, starts the threads and warms them up; `close` ends them.

    Raises:
        InputError: no such model or device, weights that do not fit, int8 where it cannot be.
    """

    def __init__(self, settings: ServeSettings) -> None:
        fit_threads()
        folder = local_folder(settings.model)
        self.pipeline = Pipeline.from_pretrained(folder, device=pick_device(settings.device), int8=settings.int8)
        self.info = model_info(self.pipeline, folder, name=settings.model_id or _name(settings.model))
        is_cuda = self.pipeline.device.type == "cuda"
        self.num_slots = settings.num_slots or (_SLOTS_CUDA if is_cuda else _SLOTS_CPU)
        self._metrics = WorkerMetrics(num_slots=self.num_slots)
        self._postprocessor = Postprocessor(self.pipeline, self.info, self._metrics)
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
        """Graphs of the codec and the ranker, while there is one thread; else the first request would pay for them."""
        pipeline = self.pipeline
        with torch.inference_mode():
            tokens = torch.zeros(1, self.info.grid_size**2, dtype=torch.int64, device=pipeline.device)
            pipeline.rank_scores(["."], pipeline.decode_images(tokens)[None])

    async def draw(self, job: GenerationJob) -> AsyncIterator[GenerationEvent]:
        """Draws a job; the last event is `Finished` or `Refused`. Closing the iterator frees its slots at once."""
        arrived_s = time.monotonic()
        if self.is_draining:
            yield Refused("draining", retry_after_s=1.0)
            return
        refused = self._unfit(job)
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
            self._metrics.rejected(reason)
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
                yield event
                if isinstance(event, Finished | Refused):
                    return
        finally:
            self._states.discard(state)
            if not state.is_over:
                state.is_over = True
                self._metrics.cancelled()
            self._decode_loop.cancel(state)

    def _state(self, job: GenerationJob, arrived_s: float) -> RequestState:
        """Raises InputError: a job that the pipeline refuses, without an init image; that one is encoded later."""
        state = RequestState(job, Future(), asyncio.get_running_loop(), arrived_s)
        if job.init_image is None:
            state.prepared.set_result(prepare(self.pipeline, job))
        return state

    def _unfit(self, job: GenerationJob) -> Refused | None:
        """What no queue can mend: the edge checks the same before, so this tells of an edge of another version."""
        if 1 + job.sampling_params.is_guided > self.num_slots:
            return Refused("invalid", "this server has one slot and guidance needs two", param="guidance")
        return None

    @property
    def slots_in_use(self) -> int:
        return self._decode_loop.scheduler.slots_in_use

    @property
    def queued_sequences(self) -> int:
        return self._decode_loop.scheduler.queued_sequences

    @property
    def num_active(self) -> int:
        """Drawings that have not ended."""
        return len(self._states)

    def metrics_text(self) -> str:
        """Prometheus exposition of this worker."""
        return self._metrics.text()

    def check_health(self) -> None:
        """Raises WorkerFailed: a thread died or hangs."""
        failure = self._decode_loop.failure or self._postprocessor.failure
        if failure is not None:
            raise WorkerFailed(f"a drawing thread died: {type(failure).__name__}") from failure
        silent_s = time.monotonic() - self._decode_loop.last_turn_s
        if silent_s > _STUCK_AFTER_S:
            raise WorkerFailed(f"the stepping thread has not turned for {silent_s:.0f} s")

    async def drain(self) -> None:
        """Takes on nothing more and waits until what was taken on is drawn."""
        self.is_draining = True
        while self._states:
            await asyncio.sleep(_DRAIN_POLL_S)

    def close(self) -> None:
        """Ends the threads; drawings that have not ended are refused."""
        self.is_draining = True
        self._decode_loop.stop()
        self._postprocessor.stop()
        for state in list(self._states):
            state.emit(Refused("failed", "the worker stopped"))


def model_info(pipeline: Pipeline, folder: Path, *, name: str) -> ModelInfo:
    """What the edge tells of a model."""
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
        attributes=pipeline.attributes,
    )


def _name(model: str) -> str:
    """`runs/demo/kodalle/model` is called kodalle."""
    path = Path(model)
    if not path.exists() and is_hub_name(model):
        return model
    path = path.resolve()
    return path.parent.name if path.name in ("model", "model-best") else path.name
