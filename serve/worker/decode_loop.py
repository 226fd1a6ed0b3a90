"""The thread that steps the decoder: rows of many requests join, share each step, and leave.

    submit ─► scheduler (who owns which slots) ─► prefix read, row joined ─► step, step … ─► all rows done ─► pictures thread
    cancel ─► its slots are free before the next step

Between two steps at most one new caption is read (a prefix costs as much arithmetic as a step of 129 rows), so that a burst
of captions does not hold up the rows in flight. No row joins while more pictures wait to be decoded than there are slots: where
the VQGAN is slower than the steps, drawing on would fill the memory and promise what cannot be kept. Captions read lately are kept: their rows share one prefix in the cache.

The scheduler is asked under a lock by whoever submits or cancels, so a full queue is told at once, not after the step.
"""

import logging
import threading
import time
from collections import OrderedDict, deque

import torch

from engine.decoding.decoders import Decoder
from engine.decoding.kv_cache import Prefix
from engine.errors import InputError
from engine.pipeline.pipeline import Pipeline
from serve.messages import Progress, Queued, Refused
from serve.metrics import WorkerMetrics
from serve.process import step_behind
from serve.scheduling.scheduler import MAX_RETRY_S, MIN_RETRY_S, SAFETY, DeadlineTooShort, Scheduler, Ticket
from serve.worker.postprocessing import Postprocessor
from serve.worker.previews import fill_rows, preview_rows
from serve.worker.request_state import Preview, RequestState
from serve.worker.warm_up import warm_up

_CAPTIONS_KEPT = 16  # 8 MiB each at the published size in float32
_IDLE_WAIT_S = 0.25
_TELL_EVERY_S = 0.1
_STEPS_AHEAD = 2  # a GPU works on one step while the host issues the next; more would make newcomers wait

log = logging.getLogger(__name__)


class DecodeLoop:
    """Owns the decoder and the scheduler; flights whose rows are all there, and previews, go to the finisher."""

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
        self._leaving: list[int] = []  # slots of cancelled rows
        self._is_stopping = False
        self._granted: deque[tuple[RequestState, int]] = (
            deque()
        )  # rows to seat; the stepping thread's own, as the following
        self._seats: dict[int, tuple[RequestState, int]] = {}  # slot -> flight and candidate
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._issued: deque[torch.cuda.Event] = deque()
        self._stepped_s: float | None = None  # when the last step ended; None after a pause
        self._is_warm = threading.Event()
        self.last_turn_s = time.monotonic()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stepper", daemon=True)

    def start(self) -> None:
        """Returns when the thread has warmed up and takes requests.

        Raises:
            RuntimeError: it died of what it met.
        """
        self._thread.start()
        self._is_warm.wait()
        if self.failure is not None:
            raise RuntimeError("the stepping thread died before its first request") from self.failure

    def stop(self) -> None:
        """Ends the thread after its current step; flights that are not over are refused."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, state: RequestState) -> Queued | None:
        """Takes a flight on.

        Returns:
            Its place in the queue; None when its first row joins before the next step.

        Raises:
            QueueFull, DeadlineTooShort: see serve/scheduling/scheduler.py.
        """
        job, now = state.job, time.monotonic()
        is_guided = job.sampling_params.is_guided
        ticket = Ticket(
            request_id=job.request_id,
            key_id=job.key_id,
            num_rows=job.num_candidates,
            slots_per_sequence=1 + is_guided,
            steps_per_sequence=self._grid_size**2,
            deadline=state.arrived_s + job.deadline_s - self._postprocessor.expected_s(job.num_candidates),
        )
        with self._changed:
            self._check_pictures(job.num_candidates, until_s=state.arrived_s + job.deadline_s, now=now)
            self.scheduler.submit(ticket, now=now)
            self._states[job.request_id] = state
            must_wait = self.scheduler.queued_sequences > job.num_candidates or (
                self.scheduler.slots_in_use + ticket.slots_per_sequence > self._num_slots
            )
            place = self._place(state, now) if must_wait else None
            self._changed.notify()
        return place

    def _check_pictures(self, num_rows: int, *, until_s: float, now: float) -> None:
        """Raises DeadlineTooShort: the pictures ahead of these, drawn or not, would be decoded too late.

        The scheduler knows steps only. Where decoding and ranking a picture takes longer than its share of the steps,
        as it does on a CPU, they are what everybody waits for.
        """
        rows_ahead = self.scheduler.slots_in_use + self.scheduler.queued_sequences
        if not self._states and not self._postprocessor.num_waiting:
            return  # an idle worker takes anything: only drawing teaches it better
        late_s = now + SAFETY * self._postprocessor.expected_s(rows_ahead + num_rows) - until_s
        if late_s > 0:
            raise DeadlineTooShort(max(MIN_RETRY_S, min(late_s, MAX_RETRY_S)))

    def cancel(self, state: RequestState) -> bool:
        """Takes a flight out at any stage; its slots are free before the next step. False: it was over already."""
        with self._changed:
            if self._states.pop(state.job.request_id, None) is None:
                return False
            state.is_over = True
            rows = self.scheduler.cancel(state.job.request_id)
            # A row that was granted and has not joined holds no slot of the decoder yet.
            self._leaving += [state.slots.pop(row) for row in rows if row in state.slots]
            self._changed.notify()
        return True

    @property
    def num_flights(self) -> int:
        """Requests waiting or being drawn."""
        return len(self._states)

    def _run(self) -> None:
        if self._pipeline.device.type == "cpu":
            step_behind()
        try:
            with self._pipeline.sampler.borrow_decoder(self._num_slots) as decoder:
                self._warm_up(decoder)
                self._is_warm.set()
                while not self._is_stopping:
                    self.last_turn_s = time.monotonic()
                    if not self._turn(decoder):
                        with self._changed:
                            if not self._is_stopping and not self._has_news():
                                self._changed.wait(_IDLE_WAIT_S)
        except Exception as error:  # the thread's outermost edge: the worker is unhealthy from here on
            self.failure = error
            log.exception("the stepping thread died")
            self._is_warm.set()
        with self._changed:
            states, self._states = list(self._states.values()), {}
        for state in states:
            state.emit(Refused("failed", "the worker stopped" if self.failure is None else "the worker failed"))

    def _warm_up(self, decoder: Decoder) -> None:
        warm_up(
            self._pipeline.sampler,
            decoder,
            null_text_tokens=self._pipeline.tokenizer.empty(self._pipeline.transformer.config.text_seq_len),
            observe=lambda seconds, rows: self.scheduler.observe_step(seconds=seconds, rows=rows),
        )

    def _has_news(self) -> bool:
        return bool(self._leaving) or self.scheduler.num_waiting > 0

    def _turn(self, decoder: Decoder) -> bool:
        """Everything between two steps, and a step. False: there is nothing to do until somebody comes."""
        begun = time.monotonic()
        self._refuse_overdue(begun)
        with self._changed:
            for slot in self._leaving:
                self._metrics.drew(tokens=len(decoder.remove(slot)))
                del self._seats[slot]
            self._leaving.clear()
            is_held = self._postprocessor.num_waiting > self._num_slots
            if not is_held:
                grants = self.scheduler.grant(now=begun)
                self._granted += [(self._states[one.request_id], one.row) for one in grants]
        is_seated = self._seat(decoder)
        self._metrics.occupied(
            slots_in_use=self.scheduler.slots_in_use,
            queued_sequences=self.scheduler.queued_sequences,
            queued_requests=self.scheduler.num_waiting,
        )
        if not self._seats:
            # While pictures are decoded, or given ones encoded, rows wait for them: that counts as time of the next step.
            if is_held or (self._granted and not is_seated):
                time.sleep(0.001)
                return True
            self._stepped_s = None
            return False
        finished = decoder.step()
        self._pace()
        self._count_step(begun)
        self._look(decoder)
        for slot in finished:
            self._finish_row(decoder, slot)
        return True

    def _refuse_overdue(self, now: float) -> None:
        with self._changed:
            overdue = [self._states[request_id] for request_id in self.scheduler.overdue(now=now)]
        for state in overdue:
            state.emit(Refused("deadline"))
            self.cancel(state)
            self._metrics.rejected("deadline")

    def _count_step(self, begun_s: float) -> None:
        """A step lasts from the end of the one before: what rows wait for it, prefills and all."""
        now = time.monotonic()
        seconds = now - (begun_s if self._stepped_s is None else self._stepped_s)
        self._stepped_s = now
        with self._changed:
            self.scheduler.observe_step(seconds=seconds, rows=self.scheduler.slots_in_use)
        self._metrics.stepped(seconds=seconds)

    def _pace(self) -> None:
        """On a GPU: waits until at most `_STEPS_AHEAD` steps are issued and not done."""
        if self._pipeline.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._issued.append(event)
        if len(self._issued) > _STEPS_AHEAD:
            self._issued.popleft().synchronize()

    def _seat(self, decoder: Decoder) -> bool:
        """Joins granted rows whose caption and picture are read; reads one caption more where that is what lacks."""
        waiting, may_read, seated = deque[tuple[RequestState, int]](), True, False
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
            if key not in self._prefixes and not may_read:
                waiting.append((state, candidate))
                continue
            may_read &= key in self._prefixes
            self._join(decoder, state, candidate, self._prefix(state, key))
            seated = True
        self._granted = waiting
        return seated

    def _refuse_unprepared(self, state: RequestState, error: BaseException) -> None:
        if isinstance(error, InputError):
            state.emit(Refused("invalid", f"{error.value}: {error.remedy}", param=error.field))
        else:
            log.error("request %s: its init image could not be encoded", state.job.request_id, exc_info=error)
            state.emit(Refused("failed", "the init image could not be encoded"))
        self.cancel(state)

    def _prefix(self, state: RequestState, key: tuple[int, ...]) -> Prefix:
        begun = time.perf_counter()
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._pipeline.sampler.prefill(state.request.text_tokens)
            self._prefixes[key] = prefix
            while len(self._prefixes) > _CAPTIONS_KEPT:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        state.timings_s.setdefault("prefill", time.perf_counter() - begun)
        return prefix

    def _join(self, decoder: Decoder, state: RequestState, candidate: int, prefix: Prefix) -> None:
        request, now = state.request, time.monotonic()
        with self._changed:
            if state.is_over:
                return
            slot = decoder.add(prefix, request.sequences()[candidate], init_tokens=request.init_tokens)
            state.slots[candidate] = slot
            self._seats[slot] = state, candidate
        if state.joined_s is None:
            state.joined_s = now
            state.timings_s["queue"] = max(0.0, now - state.arrived_s - state.timings_s["prefill"])

    def _finish_row(self, decoder: Decoder, slot: int) -> None:
        with self._changed:
            if slot in self._leaving:  # cancelled while it was drawn
                return
            state, candidate = self._seats.pop(slot)
            state.rows[candidate] = decoder.remove(slot).cpu()
            self._metrics.drew(tokens=len(state.rows[candidate]))
            del state.slots[candidate]
            is_last = self.scheduler.row_finished(state.job.request_id, candidate)
            if is_last:
                del self._states[state.job.request_id]
        if is_last:
            assert state.joined_s is not None
            state.timings_s["decode"] = time.monotonic() - state.joined_s
            self._postprocessor.finish(state)

    def _look(self, decoder: Decoder) -> None:
        """Previews that are due, and word to those who want to know how far they are."""
        now, g = time.monotonic(), self._grid_size
        for slot, (state, candidate) in list(self._seats.items()):
            if state.job.num_partials == 0 or candidate >= state.job.num_images or slot in self._leaving:
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
            # On the CPU: the pictures' thread has a stream of its own, which does not wait for this one.
            state.previews_waiting[candidate] = Preview(due - 1, rows[due - 1], filled.cpu())
            if is_new:
                self._postprocessor.preview(state, candidate)
        with self._changed:
            listeners = [one for one in self._states.values() if one.job.wants_progress]
        for state in listeners:
            if now - state.told_s >= _TELL_EVERY_S:
                self._tell(state, decoder, now)

    def _tell(self, state: RequestState, decoder: Decoder, now: float) -> None:
        if state.joined_s is None:
            with self._changed:
                place = self._place(state, now)
            if place is not None and place.position != state.told_position:
                state.told_s, state.told_position = now, place.position
                state.emit(place)
            return
        state.told_s = now
        drawn = self._grid_size**2 * len(state.rows)
        drawn += sum(len(decoder.tokens(slot)) for slot in list(state.slots.values()) if slot in self._seats)
        state.emit(Progress(drawn, self._grid_size**2 * state.job.num_candidates))

    def _place(self, state: RequestState, now: float) -> Queued | None:
        position = self.scheduler.position(state.job.request_id)
        if position is None:
            return None
        return Queued(position, self.scheduler.estimated_wait_s(state.job.request_id, now=now))
