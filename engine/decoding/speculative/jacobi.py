"""Fixed-noise Jacobi decoding: several tokens a pass, exactly those that single steps give.

B sequences, R cache rows computed, w window, C model dim, N image tokens, V image vocabulary.

A token is argmax(logits / temperature + noise), and the noise belongs to the candidate and the position. So a token is
a function of the tokens before it, and a guess of it can be checked by equality, without a draft model:

    inputs of a pass     t6   [g7   g8   g9 ]      the last known token and w - 1 guesses
    what it samples      s7    s8   s9   s10
    g7 == s7, g8 == s8, g9 != s9   ->   s7, s8, s9 are final; s10 was sampled after a wrong token: it is the next guess

The first token of a pass is always final, so no sequence takes more passes than tokens. Which tokens come out depends
on nothing but the equality of arithmetic: a position has the same bits in any window (engine/decoding/kv_cache.py), and
a sequence in any batch. A position that was never sampled is guessed to look like the cell above it.

The gain depends on the model and on the cost of rows. Two small trained models took 2.5 and 3.4 times fewer passes with
w = 8 at temperature 1; such a pass costs 1.25 times a step of one sequence at the published sizes (two cores). See
benchmarks/LOG.md.

(Jacobi for autoregressive models: Song et al., arXiv 2002.03629. With fixed noise: Wiggers and Hoogeboom, "Predictive
sampling with forecasting autoregressive models", arXiv 2002.09928.)
"""

import torch
from torch import Tensor

from engine.decoding.batch_step import BatchMetadata, batch_metadata, guided_logits, next_tokens, run_layers
from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_table import SlotTable
from engine.decoding.step_model import StepCache, StepModel, as_step_model
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest


class JacobiDecoder(Decoder):
    """Sequences in flight, 1 to `window` tokens a step. Use it as `SlotDecoder`.

    Args:
        model, num_slots, null_prefix, batch_invariant: see `SlotDecoder`.
        window: w, 2 or more. Linear layers are computed for w times as many rows.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        window: int,
        null_prefix: Prefix | None = None,
        batch_invariant: bool = True,
    ) -> None:
        self.model = as_step_model(model, batch_invariant=batch_invariant)
        self.table = SlotTable(
            num_slots, self.model.config.image_seq_len, null_prefix=null_prefix, device=self.model.device
        )
        self._passes = WindowPasses(self.model, self.table, num_rows=num_slots, window=window)

    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None = None) -> int:
        """See `SlotTable.add`."""
        slot = self.table.add(prefix, request, init_tokens=init_tokens)
        self._passes.add(slot)
        return slot

    def remove(self, slot: int) -> Tensor:
        """See `SlotTable.remove`."""
        self._passes.remove(slot)
        return self.table.remove(slot)

    def step(self) -> list[int]:
        """Gives every unfinished sequence at least one token.

        Returns:
            The slots of sequences that finished in this step.
        """
        return self._passes.step()


class WindowPasses:
    """Passes of w tokens over the sequences of a slot table, cached in rows that are given out lowest first.

    Few rows, whatever the slots: the sequences of a large table may be added and removed while few are in flight.

    cache: keys and values of all tokens but the last, which is the first input of the next pass.

    Args:
        num_rows: room for so many sequences, unconditional ones included.
        window: w, 2 or more.
    """

    def __init__(self, model: StepModel, table: SlotTable, *, num_rows: int, window: int) -> None:
        config = model.config
        assert window >= 2, window
        assert config.image_seq_len >= 2, config.image_seq_len
        self._model, self._table, self._window = model, table, window
        self.cache = model.make_cache(num_rows, window=window)
        self.rows_of: dict[int, list[int]] = {}  # by slot: the sequence's row and its unconditional sequence's
        self._free_rows = list(range(num_rows))
        # By slot: what the last passes sampled for each position so far, final or not. Lists: a few tokens a pass are
        # compared sooner than torch's operators begin.
        self._guesses: dict[int, list[int]] = {}
        self._init_tokens: dict[int, list[int]] = {}  # by slot, where the batch has some
        self._offsets = torch.arange(window, dtype=torch.int64, device=model.device)
        self._batch: BatchMetadata | None = None  # None: a sequence entered or left

    def add(self, slot: int, source: StepCache | None = None) -> None:
        """Takes a sequence on, as far as it is.

        Args:
            source: where its keys and values are, at its slots; None: it has no tokens yet.
        """
        n = self._table.num_tokens(slot)
        own_slots = self._table.slots_of(slot)
        rows = self.rows_of[slot] = [self._free_rows.pop(0) for _ in own_slots]
        self._guesses[slot] = self._table.tokens_of(slot).tolist()
        if source is not None and n > 0:
            for row, own in zip(rows, own_slots, strict=True):
                self.cache.copy_sequence(row, source, own)
        self._batch = None

    def remove(self, slot: int) -> None:
        """Frees a sequence's rows, where it has some."""
        self._free_rows = sorted(self._free_rows + self.rows_of.pop(slot, []))
        self._guesses.pop(slot, None)
        self._batch = None

    def step(self) -> list[int]:
        """See `JacobiDecoder.step`. Finished sequences are removed."""
        if not self.rows_of:
            return []
        table, N = self._table, self._model.config.image_seq_len
        batch = self._current_batch()
        positions = [table.num_tokens(slot) for slot in batch.slot_list]
        inputs = [self._inputs(slot, at) for slot, at in zip(batch.slot_list, positions, strict=True)]  # (B, w)
        sampled = self._sample_windows(batch, inputs, longest=max(positions) - 1)  # (B, w)
        accepted = []
        for index, (slot, at, fed, found) in enumerate(
            zip(batch.slot_list, positions, inputs, sampled.tolist(), strict=True)
        ):
            count, room = 1, min(self._window, N - at)
            while count < room and fed[count] == found[count - 1]:
                count += 1
            self._guesses[slot][at:] = found[:room]
            table.tokens[slot, at : at + count] = sampled[index, :count]
            accepted.append(count)
        batch.positions.add_(torch.tensor(accepted, dtype=torch.int64, device=self._model.device))
        finished = [slot for slot, count in zip(batch.slot_list, accepted, strict=True) if table.advance(slot, count)]
        for slot in finished:
            self.remove(slot)
        return finished

    def _current_batch(self) -> BatchMetadata:
        """The sequences that have entered; new ones have their first token then."""
        if self._batch is None:
            new = {slot: rows for slot, rows in self.rows_of.items() if self._table.num_tokens(slot) == 0}
            if new:
                self._sample_first(batch_metadata(self._model, self._table, new))
            self._batch = batch_metadata(self._model, self._table, self.rows_of, window=self._window)
            self.cache.set_prefixes(self._batch.prefix_refs)
            self._init_tokens = (
                {slot: self._table.init_tokens[slot].tolist() for slot in self._batch.slot_list}
                if self._batch.has_init_tokens
                else {}
            )
        return self._batch

    def _sample_first(self, batch: BatchMetadata) -> None:
        """First tokens of new sequences: their captions predict them, without a pass."""
        hidden = torch.zeros(
            batch.num_rows, 1, self._model.config.dim, dtype=self._model.dtype, device=self._model.device
        )
        for row, ref in batch.prefix_refs.items():
            hidden[row, 0] = ref.hidden
        logits = guided_logits(self._model, batch, hidden)
        sampled = next_tokens(self._table, batch, logits, batch.positions[:, None])[:, 0]
        self._table.tokens[batch.slots, 0] = sampled
        for slot, token in zip(batch.slot_list, sampled.tolist(), strict=True):
            self._guesses[slot] = [token]
            self._table.advance(slot, 1)

    def _inputs(self, slot: int, position: int) -> list[int]:
        """w tokens: the last final one, what the last pass sampled after it, then copies of the cells above."""
        N, width, known = self._model.config.image_seq_len, self._model.config.image_grid_size, self._guesses[slot]
        first = position - 1
        inputs = known[first : first + self._window]
        for cell in range(first + len(inputs), first + self._window):
            above = cell - ((cell - len(known)) // width + 1) * width
            inputs.append(known[above if above >= 0 else -1])
        if slot in self._init_tokens:  # those past the last cell are never computed
            given = self._init_tokens[slot][first : min(first + self._window, N)]
            inputs[: len(given)] = [init if init >= 0 else guess for init, guess in zip(given, inputs, strict=False)]
        return inputs

    def _sample_windows(self, batch: BatchMetadata, inputs: list[list[int]], *, longest: int) -> Tensor:
        """The tokens (B, w) of the cells one further than those of the inputs (B, w)."""
        tokens = torch.tensor(inputs, dtype=torch.int64, device=self._model.device)
        lengths = batch.positions - 1
        hidden = run_layers(self._model, self.cache, batch, tokens, lengths, longest=longest, num_rows=batch.num_rows)
        cells = (batch.positions[:, None] + self._offsets).clamp_(max=self._model.config.image_seq_len - 1)
        return next_tokens(self._table, batch, guided_logits(self._model, batch, hidden), cells)
