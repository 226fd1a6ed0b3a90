"""Decoding on a GPU: every step is one fixed program over buffers that never move, replayed as a CUDA graph.

S slots, R slots computed (a bucket), C model dim, N image tokens, V image vocabulary, L layers, P prefix positions.

    host     add ─► sequence table ─(one asynchronous copy)─┐               remove: the tokens, copied on the device
    device   hidden ─► head, sample ─► init tokens, record, embed ─► L x 5 kernels ─► hidden      x N, nothing read back

At the published size and 16 sequences of one caption a step moves 576 MB, which takes an H200 134 us at 4.3 TB/s: a
host that issues its 85 launches one by one would have 1.6 us for each. So the host decides nothing during a step:
positions count themselves on, tokens stay on the device, and which sequences finish is known beforehand. A graph is
captured for each number of slots in 1, 2, 4 ... S ("bucket"), twice: without and with the sampling filters.

Neither slot, bucket nor the rest of the batch changes a sequence's bits: see engine/decoding/cuda/step_program.py. Free
slots and finished sequences compute undefined values within bounds: see kernels/feed_tokens.py.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_graphs import capturing
from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.cuda.sequence_table import SequenceTable
from engine.decoding.cuda.step_program import StepProgram
from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_table import SlotTable
from engine.errors import InputError
from engine.measure import synchronize
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest


@dataclass(frozen=True)
class _Batch:
    """What only changes when a sequence is added, removed or finished."""

    slots: list[int]  # of sequences that are not finished
    bucket: int
    filters: bool


class GraphDecoder(Decoder):
    """Sequences in flight on a GPU. Use it as `SlotDecoder`, on one stream.

    Args:
        model: its weights must neither change nor move while the decoder lives.
        num_slots: how many sequences fit, unconditional ones included.
        null_prefix: the empty caption, prefilled; needed for guidance.
        attention: backend of attention, see engine/decoding/cuda/attention_choice.py. Only "triton" is batch-invariant;
            "auto" takes the fastest here.
        graphs: replay captured steps; None: where the model is on a GPU. Without, the same program runs launch by
            launch, to the same bits.

    Raises:
        InputError: graphs without CUDA; attention that cannot run on the model's device; a model whose layers need to know
            where their inputs lie (engine/decoding/decoders.py takes another decoder for it).
    """

    def __init__(
        self,
        model: KoDalle,
        num_slots: int,
        *,
        null_prefix: Prefix | None = None,
        attention: str = "triton",
        graphs: bool | None = None,
    ) -> None:
        config, dtype, device = model.config, model.head.weight.dtype, model.head.weight.device
        self.graphs = device.type == "cuda" if graphs is None else graphs
        if self.graphs and device.type != "cuda":
            raise InputError("graphs", self.graphs, f"needs CUDA and the model is on {device}: leave it out")
        if config.depends_on_positions:
            raise InputError(
                "transformer", "token_shift, rotary or attention_patterns", "has no step program: use SlotDecoder"
            )
        self.model = model
        self.table = SlotTable(num_slots, config.image_seq_len, null_prefix=null_prefix, device=device)
        self._pool = PrefixPool(
            num_slots,  # always enough
            (config.num_layers, config.prefix_len, config.num_heads, config.head_dim),
            null_prefix=null_prefix, dtype=dtype, device=device,
        )  # fmt: skip
        self._sequences = SequenceTable(
            num_slots, idle_position=config.image_seq_len, vocab_size=config.image_vocab_size, device=device
        )
        self._program = StepProgram(model, self.table, self._sequences, self._pool, attention=attention)
        self.attention = self._program.attention  # by name; "auto" has become one
        self._batch: _Batch | None = None
        self._version = -1  # of the slot table when `_batch` was made
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.graphs else None

    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None = None) -> int:
        """See `SlotTable.add`. The host does not wait for the device."""
        slot = self.table.add(prefix, request, init_tokens=init_tokens)
        refs = self.table.prefix_refs
        unconditional_slot = self.table.sequences[slot].unconditional_slot
        for own in self.table.slots_of(slot):
            self._program.hidden[own] = refs[own].hidden
        entry = self._pool.hold(refs[slot])
        self._sequences.set_sequence(slot, request, prefix_entry=entry, unconditional_slot=unconditional_slot)
        if unconditional_slot is not None:
            null_entry = self._pool.hold(refs[unconditional_slot])
            self._sequences.set_unconditional(unconditional_slot, source=slot, prefix_entry=null_entry)
        return slot

    def remove(self, slot: int) -> Tensor:
        """See `SlotTable.remove`."""
        for own in self.table.slots_of(slot):
            self._pool.release(self.table.prefix_refs[own])
            self._sequences.set_idle(own)
        return self.table.remove(slot)

    def clear(self) -> None:
        """Removes all sequences."""
        for slot in list(self.table.sequences):
            self.remove(slot)

    def step(self) -> list[int]:
        """Gives every unfinished sequence its next token.

        Returns:
            The slots of sequences that finished in this step.
        """
        if self._batch is None or self._version != self.table.version:
            self._batch, self._version = self._make_batch(), self.table.version
        batch = self._batch
        if batch is None:
            return []
        finished = [slot for slot in batch.slots if self.table.advance(slot, 1)]
        if len(finished) == len(batch.slots):  # what the layers would make of the last tokens is never read
            self._program.sample(batch.bucket, filters=batch.filters)
        else:
            self._run(batch.bucket, batch.filters)
        return finished

    def warm_up(self) -> dict[int, float]:
        """Compiles and captures every step there can be, so that no generation waits for it.

        Returns:
            Seconds by bucket.

        Raises:
            InputError: there are sequences, which these steps would move on.
        """
        if self.num_sequences:
            raise InputError("warm_up", f"{self.num_sequences} sequences", "call it before any is added")
        seconds = {}
        for bucket in self.buckets():
            start = time.perf_counter()
            for filters in (False, True):
                self._run(bucket, filters)
            synchronize(self._program.hidden.device)
            seconds[bucket] = time.perf_counter() - start
        return seconds

    def buckets(self) -> list[int]:
        """Numbers of slots that steps are made for: powers of two, and all slots."""
        return [2**power for power in range((self.num_slots - 1).bit_length())] + [self.num_slots]

    def _make_batch(self) -> _Batch | None:
        """The unfinished sequences, uploaded to the device; None when there are none."""
        slots = self.table.unfinished()
        if not slots:
            return None
        for slot, state in self.table.sequences.items():
            for own in self.table.slots_of(slot):
                self._sequences.set_position(own, state.position)
        self._sequences.upload()
        highest = max(own for slot in slots for own in self.table.slots_of(slot))
        filters = any(
            self._sequences.filters_logits(self.table.sequences[slot].request.sampling_params) for slot in slots
        )
        return _Batch(slots, min(bucket for bucket in self.buckets() if bucket > highest), filters)

    def _run(self, bucket: int, filters: bool) -> None:
        """One step of slots [0, bucket).

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
