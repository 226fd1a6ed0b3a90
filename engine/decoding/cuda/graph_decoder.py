"""Decoding on a GPU: every step is one fixed program over buffers that never move, replayed as a CUDA graph.

S slots, R rows computed (a bucket), C model dim, N image tokens, V image vocabulary, L layers, P prefix positions.

    host     join ─► table of rows ─(one asynchronous copy)─┐               leave: the tokens, copied on the device
    device   hidden ─► head and draw ─► given, record, embed ─► L x 5 kernels ─► hidden      x N, nothing read back

At the published size and 16 rows of one caption a step moves 576 MB, which takes an H200 134 us at 4.3 TB/s: a host that
issues its 85 launches one by one would have 1.6 us for each. So the host decides nothing during a step: positions count
themselves on, tokens stay on the device, and which rows finish is known beforehand. A graph is captured for each number
of rows in 1, 2, 4 ... S ("bucket"), twice: without and with the sampling filters.

Neither slot, bucket nor company changes a row's bits: see engine/decoding/cuda/step_program.py. Slots that nobody has, and
rows that are finished, compute rubbish within bounds: see kernels/feed_tokens.py.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_graphs import capturing
from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.cuda.sequence_table import SequenceTable
from engine.decoding.cuda.step_program import StepProgram
from engine.decoding.kv_cache import Caption, Prefix
from engine.errors import InputError
from engine.measure import synchronize
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest


@dataclass
class _Row:
    """A drawn row. `partner` is the slot that reads the empty caption for it."""

    partner: int | None
    position: int  # of the token that is drawn next
    filters: bool


@dataclass(frozen=True)
class _Plan:
    """What only changes when a row joins, leaves or finishes."""

    slots: list[int]  # of rows that are not finished
    bucket: int
    filters: bool


class GraphDecoder:
    """Rows in flight, as `SlotDecoder`. Call it in eval mode, under `torch.inference_mode`, from one thread and stream.

    Args:
        model: its weights must neither change nor move while the decoder lives.
        num_slots: how many rows fit, partners of guided rows included.
        null_prefix: the empty caption, read; needed for guidance.
        num_captions: how many different captions fit; None: one for each slot, which is always enough.
        attention: who computes attention, see engine/decoding/cuda/attention_choice.py. Anything but "triton" gives up that
            a row's tokens are the same in any company; "auto" takes the fastest here.
        graphs: replay captured steps; None: where the model is on a GPU. Without, the same program runs launch by
            launch, to the same bits.

    Raises:
        InputError: graphs without CUDA; attention that cannot run on the model's device.
    """

    def __init__(
        self,
        model: KoDalle,
        num_slots: int,
        *,
        null_prefix: Prefix | None = None,
        num_captions: int | None = None,
        attention: str = "triton",
        graphs: bool | None = None,
    ) -> None:
        config, dtype, device = model.config, model.head.weight.dtype, model.head.weight.device
        if num_slots < 1:
            raise InputError("slots", num_slots, "must be 1 or more")
        self.graphs = device.type == "cuda" if graphs is None else graphs
        if self.graphs and device.type != "cuda":
            raise InputError("graphs", self.graphs, f"needs CUDA and the model is on {device}: leave it out")
        self.model = model
        self.num_slots = num_slots
        self._null_prefix = null_prefix
        self._pool = PrefixPool(
            num_slots if num_captions is None else num_captions,
            (config.num_layers, config.prefix_len, config.num_heads, config.head_dim),
            null_prefix=null_prefix, dtype=dtype, device=device,
        )  # fmt: skip
        self._table = SequenceTable(num_slots, parked=config.image_seq_len, device=device)
        self._program = StepProgram(model, num_slots, self._table, self._pool, attention=attention)
        self.attention = self._program.attention  # by name; "auto" has become one
        self._rows: dict[int, _Row] = {}
        self._captions: dict[int, Caption] = {}  # of drawn rows and partners
        self._plan: _Plan | None = None  # None: somebody joined, left or finished
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.graphs else None

    @property
    def num_joined(self) -> int:
        """Rows that have not left, finished ones included."""
        return len(self._rows)

    @property
    def num_free(self) -> int:
        """Free slots; a guided row needs two."""
        return self.num_slots - len(self._captions)

    @property
    def can_guide(self) -> bool:
        """Whether it has the empty caption."""
        return self._null_prefix is not None

    def join(self, prefix: Prefix, request: SequenceRequest, *, given: Tensor | None = None) -> int:
        """Seats a row; it draws from the next step on. The host does not wait for the device.

        Args:
            prefix: read captions, of which `request.prefix_index` is the row's.
            given: (N,) image tokens that are not drawn, -1 where to draw.

        Returns:
            The row's slot.

        Raises:
            InputError: no such caption; guidance without `null_prefix`; no slot or no caption's place free.
        """
        if not 0 <= request.prefix_index < prefix.num_captions:
            raise InputError("prefix_index", request.prefix_index, f"there are {prefix.num_captions} captions, from 0")
        is_guided = request.sampling_params.is_guided
        if is_guided and self._null_prefix is None:
            raise InputError(
                "guidance_scale", request.sampling_params.guidance_scale, "needs the empty caption's tokens"
            )
        if self.num_free < 1 + is_guided:
            raise InputError("slots", self.num_slots, f"{self.num_free} are free and {1 + is_guided} wanted: wait")
        caption = Caption(prefix, request.prefix_index)
        place = self._pool.hold(caption)
        free = (slot for slot in range(self.num_slots) if slot not in self._captions)
        slot = next(free)
        self._captions[slot] = caption
        self._program.hidden[slot] = prefix.hidden[request.prefix_index]
        partner = None
        if is_guided:
            assert self._null_prefix is not None
            partner = next(free)
            null = self._captions[partner] = Caption(self._null_prefix, 0)
            self._program.hidden[partner] = self._null_prefix.hidden[0]
            self._table.seat_partner(partner, drawn=slot, caption=self._pool.hold(null))
        if given is None:
            self._program.given[slot] = -1
        else:
            is_far = self._program.given.is_cuda and not given.is_cuda
            self._program.given[slot].copy_(given.pin_memory() if is_far else given, non_blocking=True)
        filters = _filters(request.sampling_params, self.model.config.image_vocab_size)
        self._table.seat(slot, request, caption=place, partner=partner, filters=filters)
        self._rows[slot] = _Row(partner, position=0, filters=filters)
        self._plan = None
        return slot

    def leave(self, slot: int) -> Tensor:
        """Frees a row's slot, finished or not.

        Returns:
            (n,) the tokens that it has so far, all N when it is finished.
        """
        so_far = self.tokens(slot).clone()
        for seat in self._seats(slot):
            self._pool.release(self._captions.pop(seat))
            self._table.park(seat)
        del self._rows[slot]
        self._plan = None
        return so_far

    def clear(self) -> None:
        """All rows leave."""
        for slot in list(self._rows):
            self.leave(slot)

    def num_tokens(self, slot: int) -> int:
        """Tokens that a joined row has so far; a view of them costs more than to count them."""
        return self._rows[slot].position

    def tokens(self, slot: int) -> Tensor:
        """(n,) tokens that a joined row has so far; a view, overwritten once the row has left."""
        return self._program.tokens[slot, : self._rows[slot].position]

    def step(self) -> list[int]:
        """Gives every joined row that is not finished its next token.

        Returns:
            The slots of rows that finished in this step.
        """
        N = self.model.config.image_seq_len
        if self._plan is None:
            self._plan = self._look_around()
        if self._plan is None:
            return []
        plan = self._plan
        for slot in plan.slots:
            self._rows[slot].position += 1
        finished = [slot for slot in plan.slots if self._rows[slot].position == N]
        if len(finished) == len(plan.slots):  # nobody reads what the layers would make of the last tokens
            self._program.draw(plan.bucket, filters=plan.filters)
        else:
            self._run(plan.bucket, plan.filters)
        if finished:
            self._plan = None
        return finished

    def warm_up(self) -> dict[int, float]:
        """Compiles and captures every step there can be, so that no drawing waits for it.

        Returns:
            Seconds by bucket.

        Raises:
            InputError: rows have joined, which these steps would move on.
        """
        if self._rows:
            raise InputError("warm_up", f"{len(self._rows)} rows have joined", "call it before they do")
        seconds = {}
        for bucket in self.buckets():
            start = time.perf_counter()
            for filters in (False, True):
                self._run(bucket, filters)
            synchronize(self._program.hidden.device)
            seconds[bucket] = time.perf_counter() - start
        return seconds

    def buckets(self) -> list[int]:
        """Numbers of rows that steps are made for: powers of two, and all slots."""
        return [2**power for power in range((self.num_slots - 1).bit_length())] + [self.num_slots]

    def _look_around(self) -> _Plan | None:
        """The plan of the rows in flight, told to the device; None when all are finished."""
        N = self.model.config.image_seq_len
        slots = [slot for slot, row in self._rows.items() if row.position < N]
        if not slots:
            return None
        seated = [seat for slot in slots for seat in self._seats(slot)]
        for slot, row in self._rows.items():
            for seat in self._seats(slot):
                self._table.place(seat, row.position)
        self._table.upload()
        bucket = min(bucket for bucket in self.buckets() if bucket > max(seated))
        return _Plan(slots, bucket, filters=any(self._rows[slot].filters for slot in slots))

    def _run(self, bucket: int, filters: bool) -> None:
        """One step of rows [0, bucket).

        The first of its kind runs launch by launch, which compiles all that the capture needs; a capture runs nothing.
        """
        graph = self._graphs.get((bucket, filters))
        with torch.cuda.device_of(self._program.hidden):
            if graph is not None:
                graph.replay()
                return
            self._program.run(bucket, filters=filters)
            if self.graphs:
                graph = torch.cuda.CUDAGraph()
                # All graphs share one memory: they hand nothing to each other in it, and never run at once.
                with capturing(graph, pool=self._graph_memory):
                    self._program.run(bucket, filters=filters)
                self._graphs[bucket, filters] = graph

    def _seats(self, slot: int) -> tuple[int, ...]:
        """A row's slot, and its partner's."""
        partner = self._rows[slot].partner
        return (slot,) if partner is None else (slot, partner)


def _filters(options: SamplingParams, vocabulary: int) -> bool:
    """Whether the draw depends on top-k or top-p."""
    by_k = options.top_k is not None and options.top_k < vocabulary
    by_p = options.top_p is not None and options.top_p < 1
    return options.temperature > 0 and (by_k or by_p)
