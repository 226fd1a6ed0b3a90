"""Single steps or Jacobi windows, by how many sequences are in flight: what a server steps on a CPU.

    few slots taken    window passes: several tokens a pass, since such a pass costs little more than a step
    more               single steps: one token a step for all sequences

A sequence moves from one to the other and back at any token, with its keys and values, and gets the same tokens from
either: both compute a position with the same bits (engine/decoding/kv_cache.py). To move into the windows costs a copy
of its cache; to move back costs one step as well, since a window ends before its last token was fed.
"""

from torch import Tensor

from engine.decoding.decoder import Decoder
from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_decoder import SingleTokenSteps
from engine.decoding.slot_table import SlotTable
from engine.decoding.speculative.jacobi import WindowPasses
from engine.decoding.step_model import StepModel, as_step_model
from engine.models.transformer import KoDalle
from engine.sampling_params import SequenceRequest


class AdaptiveDecoder(Decoder):
    """Sequences in flight, several tokens a step while few slots are taken. Use it as `SlotDecoder`.

    Args:
        model, num_slots, null_prefix: see `SlotDecoder`.
        window: see `JacobiDecoder`.
        speculative_slots: window passes are taken while at most so many slots have unfinished sequences.
    """

    def __init__(
        self,
        model: KoDalle | StepModel,
        num_slots: int,
        *,
        window: int,
        speculative_slots: int,
        null_prefix: Prefix | None = None,
    ) -> None:
        self.model = as_step_model(model, batch_invariant=True)
        self.table = SlotTable(
            num_slots, self.model.config.image_seq_len, null_prefix=null_prefix, device=self.model.device
        )
        self._speculative_slots = speculative_slots
        self._steps = SingleTokenSteps(self.model, self.table)
        self._passes = WindowPasses(self.model, self.table, num_rows=speculative_slots, window=window)
        self.num_moves = {"in": 0, "back": 0}

    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None = None) -> int:
        """See `SlotTable.add`."""
        slot = self.table.add(prefix, request, init_tokens=init_tokens)
        self._steps.start(slot)
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
        unfinished = self.table.unfinished()
        if sum(len(self.table.slots_of(slot)) for slot in unfinished) > self._speculative_slots:
            self._move_back()
            return self._steps.step()
        for slot in unfinished:
            if slot not in self._passes.rows_of:
                self._passes.add(slot, self._steps.cache)
                self.num_moves["in"] += 1
        return self._passes.step()

    def next_logits(self) -> Tensor:
        """(B, V): see `SlotDecoder`."""
        self._move_back()
        return self._steps.next_logits()

    def _move_back(self) -> None:
        """Moves all sequences from the windows to single steps."""
        moved = list(self._passes.rows_of)
        for slot in moved:
            for own, row in zip(self.table.slots_of(slot), self._passes.rows_of[slot], strict=True):
                self._steps.cache.copy_sequence(own, self._passes.cache, row)
            self._passes.remove(slot)
        self.num_moves["back"] += len(moved)
        if moved:
            self._steps.feed_last_tokens(moved)
