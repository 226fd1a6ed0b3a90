"""Decoding one token a step: sequences are added and removed between any two steps, each at its own position.

R cache rows computed, C model dim, N image tokens, V image vocabulary.

    decoder = SlotDecoder(model, num_slots=64)
    slot = decoder.add(prefix, SequenceRequest(0, SamplingParams(seed=7)))    # between any two steps
    while decoder.num_sequences:
        for slot in decoder.step():                                        # one token for every sequence
            image_tokens = decoder.remove(slot)                            # finished: (N,)

    step:  hidden of every sequence ─► head ─► token ─► embedding ─► layers over the cache ─► hidden of every sequence

Batch invariance: neither the slot nor the rest of the batch changes a sequence's tokens. Noise is keyed by (seed,
candidate, position, token id), see kernels/reference.py; what remains is arithmetic whose bits must not depend on
the number of rows. So as many rows are computed as the step model's arithmetic needs (its `padding_rule`: the compiled step
those that there are, packed weights at least 4, plain ones multiples of 4, at least 16). `batch_invariant=False` drops that: tokens may then depend on
the batch. cuBLAS gives no such guarantee: on CUDA see engine/decoding/cuda/graph_decoder.py.
"""

import torch
from torch import Tensor

from engine.decoding.batch_step import BatchMetadata, batch_metadata, guided_logits, next_tokens, run_layers
from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_table import SlotTable
from engine.decoding.step_model import StepModel, as_step_model
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest

_READ_AT_ONCE = 16  # known tokens of a sequence in one pass: a third of the time of single steps (LOG.md)


class SlotDecoder(Decoder):
    """Sequences in flight, one token a step. Use it with a model in eval mode and under `torch.inference_mode`, from one thread.

    Args:
        model: its weights must not change while sequences are in flight. For packed weights, a step model
            (engine.decoding.cpu.packed_weights.make_step_model).
        num_slots: how many sequences fit, unconditional ones included.
        null_prefix: the empty caption, prefilled; needed for guidance.
        batch_invariant: see the module's docstring.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        null_prefix: Prefix | None = None,
        batch_invariant: bool = True,
    ) -> None:
        self.model = as_step_model(model, batch_invariant=batch_invariant)
        self.table = SlotTable(
            num_slots, self.model.config.image_seq_len, null_prefix=null_prefix, device=self.model.device
        )
        self._steps = SingleTokenSteps(self.model, self.table)

    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None = None) -> int:
        """See `SlotTable.add`."""
        slot = self.table.add(prefix, request, init_tokens=init_tokens)
        self._steps.start(slot)
        return slot

    def remove(self, slot: int) -> Tensor:
        """See `SlotTable.remove`."""
        return self.table.remove(slot)

    def step(self) -> list[int]:
        """Gives every unfinished sequence its next token.

        Returns:
            The slots of sequences that finished in this step.
        """
        return self._steps.step()

    def read_init_tokens(self) -> None:
        """See `Decoder.read_init_tokens`."""
        self._steps.read_init_tokens()

    def next_logits(self) -> Tensor:
        """(B, V): what the unfinished sequences' next tokens are sampled from, lowest slot first; before temperature."""
        return self._steps.next_logits()


class SingleTokenSteps:
    """Steps of one token over the sequences of a slot table, each cached at its own slot.

    cache: keys and values of all tokens but the last, which is fed at the end of the step that samples it.
    hidden: (padded S, C), the last layer's output after the last token, which the next one is sampled from.
    """

    def __init__(self, model: StepModel, table: SlotTable) -> None:
        config, room = model.config, model.padding_rule.padded(table.num_slots)
        self._model, self._table = model, table
        self.cache = model.make_cache(room)
        self.hidden = torch.zeros(room, config.dim, dtype=model.dtype, device=model.device)
        self._batch: BatchMetadata | None = None
        self._version = -1  # of the table when `_batch` was made

    def start(self, slot: int) -> None:
        """To be called for each sequence that is added to the table: its caption predicts the first token."""
        for own in self._table.slots_of(slot):
            self.hidden[own] = self._table.prefix_refs[own].hidden

    def read_init_tokens(self) -> None:
        """Feeds the init tokens that all sequences begin with, `_READ_AT_ONCE` a pass. A position has the bits of a single step.

        Nothing happens unless all sequences are at their first position.
        """
        table, slots = self._table, self._table.unfinished()
        if not slots or any(table.num_tokens(slot) for slot in slots):
            return
        known = table.init_tokens[slots] >= 0  # (B, N)
        count = min(int(known.long().cumprod(1).sum(1).min()), self._model.config.image_seq_len - 1)
        if count < 2:
            return
        batch = batch_metadata(self._model, table, {slot: table.slots_of(slot) for slot in slots})
        tokens = table.init_tokens[batch.slots, :count]  # (B, count)
        R = self._model.padding_rule.padded(batch.num_rows)
        for start in range(0, count, _READ_AT_ONCE):
            part = tokens[:, start : start + _READ_AT_ONCE]
            self.cache.set_window(part.shape[1])
            self.cache.set_prefixes(batch.prefix_refs)
            lengths = torch.full_like(batch.positions, start)
            hidden = run_layers(self._model, self.cache, batch, part, lengths, longest=start, num_rows=R)
            self.hidden[:R] = hidden[:, -1]
        self.cache.set_window(1)
        table.tokens[batch.slots, :count] = tokens
        for slot in slots:
            table.advance(slot, count)
        self._batch = None

    def step(self) -> list[int]:
        """See `SlotDecoder.step`."""
        batch = self._current_batch()
        if batch is None:
            return []
        table, longest = self._table, self._longest(batch.slot_list)
        positions = batch.positions[:, None]
        sampled = next_tokens(
            table, batch, guided_logits(self._model, batch, self.hidden[:, None]), positions
        )  # (B, 1)
        table.tokens[batch.slots, batch.positions] = sampled[:, 0]
        finished = [slot for slot in batch.slot_list if table.advance(slot, 1)]
        if len(finished) < len(batch.slot_list):
            self._feed(batch, sampled, batch.positions, longest)
        batch.positions.add_(1)
        return finished

    def next_logits(self) -> Tensor:
        """See `SlotDecoder.next_logits`."""
        batch = self._current_batch()
        if batch is None:
            return self.hidden.new_empty(0, self._model.config.image_vocab_size)
        return guided_logits(self._model, batch, self.hidden[:, None])[:, 0]

    def feed_last_tokens(self, slots: list[int]) -> None:
        """Feeds the last token of some sequences whose cache lacks it, and nothing to any other sequence."""
        table = self._table
        # A step overwrites `hidden` up to its highest slot; other sequences keep theirs.
        before = self.hidden.clone()
        batch = batch_metadata(self._model, table, {slot: table.slots_of(slot) for slot in slots})
        self.cache.set_prefixes(batch.prefix_refs)
        lengths = batch.positions - 1
        self._feed(batch, table.tokens[batch.slots, lengths][:, None], lengths, self._longest(slots) - 1)
        fed = torch.tensor(list(batch.prefix_refs), dtype=torch.int64, device=before.device)
        before[fed] = self.hidden[fed]
        self.hidden = before
        self._batch = None

    def _current_batch(self) -> BatchMetadata | None:
        """The unfinished sequences; None when there are none."""
        if self._batch is None or self._version != self._table.version:
            slots = self._table.unfinished()
            if not slots:
                return None
            self._batch = batch_metadata(self._model, self._table, {slot: self._table.slots_of(slot) for slot in slots})
            self._version = self._table.version
            self.cache.set_prefixes(self._batch.prefix_refs)
        return self._batch

    def _feed(self, batch: BatchMetadata, tokens: Tensor, lengths: Tensor, longest: int) -> None:
        """tokens (B, 1) through the layers, to `hidden`."""
        # The last token is never an input: a sequence that has just finished is fed at a position that there is.
        last = self._model.config.image_seq_len - 2
        R = self._model.padding_rule.padded(batch.num_rows)
        hidden = run_layers(
            self._model, self.cache, batch, tokens, lengths.clamp(max=last), longest=min(longest, last), num_rows=R
        )
        self.hidden[:R] = hidden[:, 0]

    def _longest(self, slots: list[int]) -> int:
        return max(self._table.num_tokens(slot) for slot in slots)
