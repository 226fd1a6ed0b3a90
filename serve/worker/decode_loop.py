"""The decode loop: a thread that steps the decoder with continuous batching of many requests' sequences.

    submit ─► scheduler grants slots ─► prefill, add sequence ─► step, step … ─► request complete ─► postprocessing thread
    cancel ─► its slots are free before the next step

Between two steps at most one new caption is prefilled (which costs as much arithmetic as a step of text_seq_len + 1 sequences), so a
burst of captions does not stall the sequences in flight. Recent prefixes are cached and shared by their sequences. No
sequence is started while more candidates wait for postprocessing than there are slots: if the VQGAN is slower than the
steps, decoding on would fill the memory and delay results beyond their estimates.

The scheduler is called under a lock by the threads that submit or cancel, so a full queue is reported at once and not after
the step.
"""

import logging
import threading
import time
from collections import OrderedDict, deque

import torch

from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.errors import InputError
from engine.pipeline.pipeline import Pipeline
from serve.messages import Progress, Queued, Refused
from serve.metrics import WorkerMetrics
from serve.process import lower_thread_priority
from serve.scheduling.scheduler import MAX_RETRY_S, MIN_RETRY_S, SAFETY, Scheduler
from serve.scheduling.tickets import DeadlineTooShort, Ticket
from serve.worker.postprocessing import Postprocessor
from serve.worker.previews import fill_rows, preview_rows
from serve.worker.request_state import Preview, RequestState
from serve.worker.warm_up import warm_up

_PREFIXES_CACHED = 16  # 8 MiB each at the published size in float32
_IDLE_WAIT_S = 0.25
_PROGRESS_EVERY_S = 0.1
_STEPS_AHEAD = 2  # a GPU runs one step while the host issues the next; more would delay new sequences

log = logging.getLogger(__name__)


class DecodeLoop:
    """Owns the decoder and the scheduler; passes complete requests and previews on to the postprocessor."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        num_slots: int,
        max_queued_sequences: int,
        metrics: WorkerMetrics,
        postprocessor: Postprocessor,
    ) -> None:
        self._pipeline, self._postprocessor = pipeline, postprocessor
        self.scheduler = Scheduler(num_slots=num_slots, max_queued_sequences=max_queued_sequences)
        self._num_slots = num_slots
        self._metrics = metrics
        self._grid_size = pipeline.vqgan.config.grid_size
        self._changed = threading.Condition()  # guards the scheduler and the fields below
        self._states: dict[str, RequestState] = {}
        self._cancelled_slots: list[int] = []
        self._is_stopping = False
        # The fields below belong to the loop's thread.
        self._granted: deque[tuple[RequestState, int]] = deque()  # (request, candidate) not yet added to the decoder
        self._running: dict[int, tuple[RequestState, int]] = {}  # slot -> (request, candidate)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._issued: deque[torch.cuda.Event] = deque()
        self._stepped_s: float | None = None  # end of the last step; None after an idle phase
        self._is_warm = threading.Event()
        self.last_iteration_s = time.monotonic()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns when it has warmed up and accepts requests.

        Raises:
            RuntimeError: the warm-up failed.
        """
        self._thread.start()
        self._is_warm.wait()
        if self.failure is not None:
            raise RuntimeError("the decode loop failed during its warm-up") from self.failure

    def stop(self) -> None:
        """Stops the thread after its current step; unfinished requests are refused."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, state: RequestState) -> Queued | None:
        """Admits a request.

        Returns:
            Its position in the queue; None if its first sequence starts before the next step.

        Raises:
            QueueFull, DeadlineTooShort: see serve/scheduling/scheduler.py.
        """
        job, now = state.job, time.monotonic()
        is_guided = job.sampling_params.is_guided
        ticket = Ticket(
            request_id=job.request_id,
            key_id=job.key_id,
            num_sequences=job.num_candidates,
            slots_per_sequence=1 + is_guided,
            steps_per_sequence=self._grid_size**2,
            deadline=state.arrived_s + job.deadline_s - self._postprocessor.expected_s(job.num_candidates),
        )
        with self._changed:
            self._check_postprocessing(job.num_candidates, until_s=state.arrived_s + job.deadline_s, now=now)
            self.scheduler.submit(ticket, now=now)
            self._states[job.request_id] = state
            must_wait = self.scheduler.queued_sequences > job.num_candidates or (
                self.scheduler.slots_in_use + ticket.slots_per_sequence > self._num_slots
            )
            place = self._place(state, now) if must_wait else None
            self._changed.notify()
        return place

    def _check_postprocessing(self, num_candidates: int, *, until_s: float, now: float) -> None:
        """Raises DeadlineTooShort if postprocessing of the candidates ahead would make these miss their deadline.

        The scheduler knows only steps. Where decoding and ranking an image takes longer than its share of the steps, as on
        a CPU, postprocessing is the bottleneck.
        """
        num_ahead = self.scheduler.slots_in_use + self.scheduler.queued_sequences
        if not self._states and not self._postprocessor.num_waiting:
            return  # an idle worker admits any request: only work can correct its estimates
        late_s = now + SAFETY * self._postprocessor.expected_s(num_ahead + num_candidates) - until_s
        if late_s > 0:
            raise DeadlineTooShort(max(MIN_RETRY_S, min(late_s, MAX_RETRY_S)))

    def cancel(self, state: RequestState) -> bool:
        """Cancels a request at any stage; its slots are free before the next step. False: it had ended already."""
        with self._changed:
            if self._states.get(state.job.request_id) is not state:  # ended, and another request may have its id now
                return False
            del self._states[state.job.request_id]
            state.is_over = True
            candidates = self.scheduler.cancel(state.job.request_id)
            # A candidate that was granted but not added yet holds no slot of the decoder.
            self._cancelled_slots += [state.slots.pop(one) for one in candidates if one in state.slots]
            self._changed.notify()
        return True

    def _run(self) -> None:
        if self._pipeline.device.type == "cpu":
            lower_thread_priority()
        try:
            with self._pipeline.sampler.borrow_decoder(self._num_slots) as decoder:
                self._warm_up(decoder)
                self._is_warm.set()
                while not self._is_stopping:
                    self.last_iteration_s = time.monotonic()
                    if not self._iterate(decoder):
                        with self._changed:
                            if not self._is_stopping and not self._has_work():
                                self._changed.wait(_IDLE_WAIT_S)
        except Exception as error:  # top of the thread: the worker is unhealthy from here on
            self.failure = error
            log.exception("the decode loop failed")
            self._is_warm.set()
        with self._changed:
            states, self._states = list(self._states.values()), {}
        for state in states:
            state.emit(Refused("failed", "the worker stopped" if self.failure is None else "the worker failed"))

    def _warm_up(self, decoder: Decoder) -> None:
        length = self._pipeline.transformer.config.text_seq_len
        warm_up(
            self._pipeline.sampler,
            decoder,
            text_tokens=torch.zeros(1, length, dtype=torch.int64, device="cpu"),
            observe=lambda seconds, slots: self.scheduler.observe_step(seconds=seconds, slots=slots),
        )

    def _has_work(self) -> bool:
        return bool(self._cancelled_slots) or self.scheduler.num_waiting > 0

    def _iterate(self, decoder: Decoder) -> bool:
        """One iteration: bookkeeping between two steps, and a step. False: idle until a request arrives."""
        started_s = time.monotonic()
        self._refuse_overdue(started_s)
        with self._changed:
            for slot in self._cancelled_slots:
                self._metrics.count_tokens(len(decoder.remove(slot)))
                del self._running[slot]
            self._cancelled_slots.clear()
            is_held = self._postprocessor.num_waiting > self._num_slots
            if not is_held:
                grants = self.scheduler.grant(now=started_s)
                self._granted += [(self._states[one.request_id], one.candidate) for one in grants]
        has_added = self._add_granted(decoder)
        self._metrics.set_occupancy(
            slots_in_use=self.scheduler.slots_in_use,
            queued_sequences=self.scheduler.queued_sequences,
            queued_requests=self.scheduler.num_waiting,
        )
        if not self._running:
            # Sequences wait for postprocessing, or for their init images: that counts as time of the next step.
            if is_held or (self._granted and not has_added):
                time.sleep(0.001)
                return True
            self._stepped_s = None
            return False
        finished = decoder.step()
        self._pace()
        self._count_step(started_s)
        self._send_updates(decoder)
        for slot in finished:
            self._finish_sequence(decoder, slot)
        return True

    def _refuse_overdue(self, now: float) -> None:
        with self._changed:
            overdue = [self._states[request_id] for request_id in self.scheduler.overdue(now=now)]
        for state in overdue:
            state.emit(Refused("deadline"))
            self.cancel(state)

    def _count_step(self, started_s: float) -> None:
        """Records a step's duration, from the end of the previous one: prefills between them are included."""
        now = time.monotonic()
        seconds = now - (started_s if self._stepped_s is None else self._stepped_s)
        self._stepped_s = now
        with self._changed:
            self.scheduler.observe_step(seconds=seconds, slots=self.scheduler.slots_in_use)
        self._metrics.observe_step(seconds=seconds)

    def _pace(self) -> None:
        """On a GPU: waits until at most `_STEPS_AHEAD` issued steps are unfinished."""
        if self._pipeline.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._issued.append(event)
        if len(self._issued) > _STEPS_AHEAD:
            self._issued.popleft().synchronize()

    def _add_granted(self, decoder: Decoder) -> bool:
        """Adds granted sequences whose prefix and init image are ready, after at most one new prefill."""
        waiting, may_prefill, has_added = deque[tuple[RequestState, int]](), True, False
        for state, candidate in self._granted:
            if state.is_over:
                continue  # cancelled; the scheduler has its slots back
            if not state.prepared.done():
                waiting.append((state, candidate))
                continue
            if (error := state.prepared.exception()) is not None:
                self._refuse_unprepared(state, error)
                continue
            key = tuple(state.request.text_tokens[0].tolist())
            if key not in self._prefixes and not may_prefill:
                waiting.append((state, candidate))
                continue
            may_prefill &= key in self._prefixes
            self._add(decoder, state, candidate, self._prefix(state, key))
            has_added = True
        self._granted = waiting
        return has_added

    def _refuse_unprepared(self, state: RequestState, error: BaseException) -> None:
        if isinstance(error, InputError):
            state.emit(Refused("invalid", f"{error.value}: {error.remedy}", param=error.field))
        else:
            log.error("request %s: its init image could not be encoded", state.job.request_id, exc_info=error)
            state.emit(Refused("failed", "the init image could not be encoded"))
        self.cancel(state)

    def _prefix(self, state: RequestState, key: tuple[int, ...]) -> Prefix:
        started_s = time.perf_counter()
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._pipeline.sampler.prefill(state.request.text_tokens)
            self._prefixes[key] = prefix
            while len(self._prefixes) > _PREFIXES_CACHED:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        state.timings_s.setdefault("prefill", time.perf_counter() - started_s)
        return prefix

    def _add(self, decoder: Decoder, state: RequestState, candidate: int, prefix: Prefix) -> None:
        request, now = state.request, time.monotonic()
        with self._changed:
            if state.is_over:
                return
            slot = decoder.add(prefix, request.sequences()[candidate], init_tokens=request.init_tokens)
            state.slots[candidate] = slot
            self._running[slot] = state, candidate
        if state.started_s is None:
            state.started_s = now
            state.timings_s["queue"] = max(0.0, now - state.arrived_s - state.timings_s["prefill"])

    def _finish_sequence(self, decoder: Decoder, slot: int) -> None:
        with self._changed:
            if slot in self._cancelled_slots:  # cancelled while it was running
                return
            state, candidate = self._running.pop(slot)
            state.image_tokens[candidate] = decoder.remove(slot).cpu()
            self._metrics.count_tokens(len(state.image_tokens[candidate]))
            del state.slots[candidate]
            is_last = self.scheduler.sequence_finished(state.job.request_id, candidate)
            if is_last:
                del self._states[state.job.request_id]
        if is_last:
            assert state.started_s is not None
            state.timings_s["decode"] = time.monotonic() - state.started_s
            self._postprocessor.finish(state)

    def _send_updates(self, decoder: Decoder) -> None:
        """Submits due previews, and sends queue positions and progress to the clients that want them."""
        now, g = time.monotonic(), self._grid_size
        for slot, (state, candidate) in list(self._running.items()):
            if state.job.num_partials == 0 or candidate >= state.job.num_images or slot in self._cancelled_slots:
                continue
            rows = preview_rows(state.job.num_partials, g)
            index, tokens = state.previews_due.get(candidate, 0), decoder.tokens(slot)
            due = sum(len(tokens) >= row * g for row in rows)
            if due <= index or len(tokens) == g * g:
                continue
            state.previews_due[candidate] = due
            init_tokens = state.request.init_tokens
            filled = fill_rows(tokens, rows_generated=rows[due - 1], grid_size=g, init_tokens=init_tokens).clone()
            is_new = candidate not in state.previews_waiting
            # On the CPU: the postprocessing thread has a stream of its own, which does not wait for this one.
            state.previews_waiting[candidate] = Preview(due - 1, rows[due - 1], filled.cpu())
            if is_new:
                self._postprocessor.preview(state, candidate)
        with self._changed:
            listeners = [one for one in self._states.values() if one.job.wants_progress]
        for state in listeners:
            if now - state.reported_s >= _PROGRESS_EVERY_S:
                self._report_progress(state, decoder, now)

    def _report_progress(self, state: RequestState, decoder: Decoder, now: float) -> None:
        if state.started_s is None:
            with self._changed:
                place = self._place(state, now)
            if place is not None and place.position != state.reported_position:
                state.reported_s, state.reported_position = now, place.position
                state.emit(place)
            return
        state.reported_s = now
        sampled = self._grid_size**2 * len(state.image_tokens)
        sampled += sum(len(decoder.tokens(slot)) for slot in list(state.slots.values()) if slot in self._running)
        state.emit(Progress(sampled, self._grid_size**2 * state.job.num_candidates))

    def _place(self, state: RequestState, now: float) -> Queued | None:
        position = self.scheduler.position(state.job.request_id)
        if position is None:
            return None
        return Queued(position, self.scheduler.estimated_wait_s(state.job.request_id, now=now))
