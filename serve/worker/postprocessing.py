"""Postprocessing of image tokens: a thread for VQGAN and KoCLIP, and a thread pool for image encoding.

The thread's tasks by priority:

    0    encode init images: their sequences hold slots and wait
    1    complete requests: decode, paste, rank, then encode the requested images
    2    previews; one that is not decoded before the next of its candidate is due is dropped. Embeddings

On a GPU the thread has a stream of its own, because sampling tokens is bound by memory and decoding images by arithmetic.
On a CPU it shares the cores with the decode loop. Nothing here runs on the event loop: a PNG of 256 x 256 takes 7 ms.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from PIL import Image

from engine.errors import InputError
from engine.pipeline.generation import Candidate, PreparedRequest
from engine.pipeline.image_encoding import encode_image
from engine.pipeline.image_files import to_uint8
from engine.pipeline.interruption import BeforePart, uninterrupted
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.provenance import ModelRecord, digital_source
from engine.pipeline.rendition import Rendition, render
from serve.messages import Finished, GeneratedImage, GenerationJob, ModelInfo, Partial, Refused
from serve.metrics import WorkerMetrics
from serve.process import lower_thread_priority
from serve.worker.content_credentials import ContentCredentials
from serve.worker.previews import blank_missing
from serve.worker.request_state import RequestOver, RequestState

_ENCODERS = 2
_WEIGHT = 1 / 8  # of a request in the moving average of seconds per image

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class WorkerStopped(RuntimeError):
    """The thread stopped before it came to a call."""


@dataclass(order=True)
class _Task:
    priority: int
    number: int  # first in, first out within a priority
    state: RequestState | None = field(compare=False)
    run: Callable[[], None] = field(compare=False)


class Postprocessor:
    """Owns the postprocessing thread and the encoding threads."""

    def __init__(
        self,
        pipeline: Pipeline,
        info: ModelInfo,
        metrics: WorkerMetrics,
        *,
        visible_mark: str = "",
        credentials: ContentCredentials | None = None,
    ) -> None:
        self._pipeline, self._info, self._metrics = pipeline, info, metrics
        self._visible_mark, self._credentials = visible_mark, credentials
        self._model = ModelRecord(model=info.model_id, model_digest=info.digest, arithmetic=pipeline.arithmetic)
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encoder")
        self._thread = threading.Thread(target=self._run, name="postprocessing", daemon=True)
        self._is_stopping = False
        self._image_s = 0.0  # moving average of the seconds that a candidate's decoding and ranking take
        self.num_waiting = 0  # candidates whose tokens are sampled and whose images are not decoded
        self._calls: set[Future[Any]] = set()
        self._counting = threading.Lock()  # guards the two above
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def expected_s(self, num_candidates: int) -> float:
        """Estimated seconds until so many further candidates are decoded and ranked, behind the waiting ones."""
        return self._image_s * (self.num_waiting + num_candidates)

    def stop(self) -> None:
        """Stops the threads after their current tasks."""
        self._is_stopping = True
        self._put(-1, None, lambda: None)
        self._thread.join()
        with self._counting:
            for call in self._calls:
                if not call.done() and call.set_running_or_notify_cancel():
                    call.set_exception(WorkerStopped())
        self._encoders.shutdown(wait=True, cancel_futures=True)

    def prepare(self, state: RequestState) -> None:
        """Sets `state.prepared` of a job with an init image, whose encoding would block the event loop."""

        def run() -> None:
            try:
                state.stop_if_over()
                prepared = prepare(self._pipeline, state.job, before_part=state.stop_if_over)
            except (InputError, RuntimeError, ValueError, RequestOver) as error:
                state.prepared.set_exception(error)
            else:
                state.prepared.set_result(prepared)

        self._put(0, None, run)

    def finish(self, state: RequestState) -> None:
        self._count(state.job.num_candidates)

        def finish() -> None:
            try:
                self._finish(state)
            except RequestOver:
                return
            finally:
                self._count(-state.job.num_candidates)

        self._put(1, state, finish)

    def preview(self, state: RequestState, candidate: int) -> None:
        self._put(2, state, lambda: self._preview(state, candidate))

    def call(self, run: Callable[[], Result]) -> Future[Result]:
        """Runs something in the thread, behind complete requests; WorkerStopped if the thread stops before."""
        future: Future[Result] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(run())
            except BaseException as error:
                future.set_exception(error)
                raise

        with self._counting:
            self._calls = {one for one in self._calls if not one.done()} | {future}
        self._put(2, None, call)
        return future

    def _count(self, num_candidates: int) -> None:
        with self._counting:
            self.num_waiting += num_candidates

    def _put(self, priority: int, state: RequestState | None, run: Callable[[], None]) -> None:
        self._tasks.put(_Task(priority, next(self._numbers), state, run))

    def _run(self) -> None:
        cuda = self._pipeline.device.type == "cuda"
        if not cuda:
            lower_thread_priority()
        stream = torch.cuda.stream(torch.cuda.Stream(self._pipeline.device)) if cuda else contextlib.nullcontext()
        with stream, torch.inference_mode():
            while not self._is_stopping:
                task = self._tasks.get()
                try:
                    task.run()
                except Exception as error:  # a task's failure is reported to its request only
                    log.exception("a postprocessing task failed")
                    if task.state is not None:
                        task.state.emit(Refused("failed", "the image could not be decoded"))
                    if cuda and not isinstance(error, ValueError):  # a device error affects all requests
                        self.failure = error
                        return

    def _finish(self, state: RequestState) -> None:
        state.stop_if_over()
        request = state.request
        tokens = torch.stack([state.image_tokens[number] for number in request.candidates])  # (n, N)
        timings_s: dict[str, float] = {}
        generation = self._pipeline.finish(request, tokens, timings_s=timings_s, before_part=state.stop_if_over)
        state.stop_if_over()
        state.timings_s |= timings_s
        share_s = sum(timings_s.values()) / len(request.candidates)
        self._image_s += _WEIGHT * (share_s - self._image_s) if self._image_s else share_s
        _Encoding(state, generation.candidates, self).start()

    def _preview(self, state: RequestState, candidate: int) -> None:
        preview = state.previews_waiting.pop(candidate, None)
        if preview is None or state.is_over:
            return
        request, g = state.request, self._info.grid_size
        tokens = preview.image_tokens[None].to(self._pipeline.device)
        images = self._pipeline.decode_images(tokens, init_image=request.init_image)
        images = blank_missing(
            images, rows_generated=preview.rows_generated, grid_size=g, init_tokens=request.init_tokens
        )
        image = Image.fromarray(to_uint8(images)[0].numpy())

        def encode() -> None:
            data = self.encoded(state, candidate, image, self.marked(Rendition()))
            state.emit(Partial(candidate, preview.index, preview.rows_generated, g, data))

        self._encoders.submit(_run_encoding, state, encode)

    def marked(self, rendition: Rendition) -> Rendition:
        """A rendition with this server's visible mark."""
        return replace(rendition, visible_mark=self._visible_mark)

    def encoded(
        self, state: RequestState, candidate: int, image: Image.Image, rendition: Rendition, *, is_final: bool = False
    ) -> bytes:
        """An image in the job's format, with its provenance as metadata, and signed if it is final."""
        job, made = state.job, self.provenance(state, candidate, rendition)
        source = digital_source(made)
        content = encode_image(
            render(image, rendition, ground=self._pipeline.ground),
            job.image_format,
            compression=job.compression,
            metadata=made,
            source=source,
        )
        if self._credentials is None or not is_final:
            return content
        return self._credentials.sign(content, job.image_format, source)

    def provenance(self, state: RequestState, candidate: int, rendition: Rendition) -> dict[str, Any]:
        """A candidate's provenance, with the model's id in the API."""
        return self._pipeline.provenance(state.request, candidate, model=self._model, rendition=rendition)

    def submit_encoding(self, state: RequestState, run: Callable[[], None]) -> None:
        self._encoders.submit(_run_encoding, state, run)

    def count_finished(self, state: RequestState) -> None:
        """Counts a finished request."""
        self._metrics.observe_finished(images=state.job.num_candidates, timings_s=state.timings_s)


class _Encoding:
    """Parallel encoding of a request's images; the last one to finish sends `Finished`."""

    def __init__(self, state: RequestState, candidates: tuple[Candidate, ...], postprocessor: Postprocessor) -> None:
        self._state, self._candidates, self._postprocessor = state, candidates, postprocessor
        job = state.job
        self._rendition = postprocessor.marked(job.rendition)
        self._wanted = [one for one in candidates if one.rank <= job.num_images or job.wants_all]
        self._data: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._started_s = time.perf_counter()

    def start(self) -> None:
        for one in self._wanted:
            self._postprocessor.submit_encoding(self._state, lambda one=one: self._encode(one))  # type: ignore[misc]

    def _encode(self, one: Candidate) -> None:
        self._state.stop_if_over()
        data = self._postprocessor.encoded(self._state, one.candidate, one.image, self._rendition, is_final=True)
        with self._lock:
            self._data[one.candidate] = data
            is_last = len(self._data) == len(self._wanted)
        if is_last:
            self._send()

    def _send(self) -> None:
        state, job = self._state, self._state.job
        state.timings_s["encoding"] = time.perf_counter() - self._started_s
        state.timings_s["total"] = time.monotonic() - state.arrived_s
        images = tuple(
            GeneratedImage(
                candidate=one.candidate,
                seed=one.seed,
                rank=one.rank,
                score=one.score,
                contrast=one.contrast,
                score_percentile=one.score_percentile,
                log_likelihood=one.log_likelihood,
                provenance=self._postprocessor.provenance(state, one.candidate, self._rendition),
                data=self._data.get(one.candidate),
            )
            for one in self._candidates
        )
        request = state.request
        num_sampled = len(self._candidates[0].image_tokens)
        if request.init_tokens is not None:
            num_sampled = int((request.init_tokens < 0).sum())
        finished = Finished(
            images=images,
            text_tokens=request.tokens_read,
            tokens_cut=request.tokens_cut,
            image_tokens=job.num_candidates * num_sampled,
            timings_s=dict(state.timings_s),
        )
        self._postprocessor.count_finished(state)
        state.emit(finished)


def _run_encoding(state: RequestState, run: Callable[[], None]) -> None:
    """Runs a task in an encoding thread and reports its failure to the request."""
    try:
        run()
    except RequestOver:
        return
    except Exception:
        log.exception("an image could not be encoded")
        state.emit(Refused("failed", "the image could not be encoded"))


def prepare(pipeline: Pipeline, job: GenerationJob, *, before_part: BeforePart = uninterrupted) -> PreparedRequest:
    """A job's prepared request; raises InputError as `Pipeline.prepare`."""
    return pipeline.prepare(
        [job.caption], job.sampling_params, init_image=job.init_image, rank_by=job.rank_by, before_part=before_part
    )[0]
