"""The slot table: which sequences are in flight, their slots, prefixes, positions and tokens.

S slots, N image tokens.

    slot 0   sequence a                    reads its caption
    slot 1   a's unconditional sequence    reads the empty caption and is fed a's tokens; only with guidance
    slot 2   free
    slot 3   sequence b                    reads its caption

Every decoder keeps one. What it computes of a slot, keys and values for example, is the decoder's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decoding.kv_cache import Prefix, PrefixRef
from engine.errors import InputError
from engine.sampling_params import SequenceRequest


@dataclass
class SequenceState:
    """A sequence in flight."""

    request: SequenceRequest
    unconditional_slot: int | None  # None: no guidance
    position: int  # of the token that is sampled next
    has_init_tokens: bool


class SlotTable:
    """Sequences in slots that are given out lowest first.

    tokens: (S, N + 1) int64, sampled so far; column N takes what captured steps compute for finished sequences.
    init_tokens: (S, N) int64, tokens that are given instead of sampled; -1 where to sample.
    prefix_refs: the caption that each taken slot reads.
    version: changes whenever a sequence is added, removed or finished.

    Args:
        num_slots: S, unconditional sequences included.
        num_tokens: N.
        null_prefix: the empty caption, prefilled; needed for guidance.
    """

    def __init__(self, num_slots: int, num_tokens: int, *, null_prefix: Prefix | None, device: torch.device) -> None:
        if num_slots < 1:
            raise InputError("slots", num_slots, "must be 1 or more")
        self.num_slots, self.num_image_tokens = num_slots, num_tokens
        self.tokens = torch.zeros(num_slots, num_tokens + 1, dtype=torch.int64, device=device)
        self.init_tokens = torch.full((num_slots, num_tokens), -1, dtype=torch.int64, device=device)
        self.sequences: dict[int, SequenceState] = {}
        self.prefix_refs: dict[int, PrefixRef] = {}
        self.version = 0
        self._null_ref = None if null_prefix is None else PrefixRef(null_prefix, 0)

    @property
    def num_sequences(self) -> int:
        """Sequences that have not been removed, finished ones included."""
        return len(self.sequences)

    @property
    def num_free(self) -> int:
        """Free slots; a guided sequence needs two."""
        return self.num_slots - len(self.prefix_refs)

    @property
    def can_guide(self) -> bool:
        """Whether it has the empty caption."""
        return self._null_ref is not None

    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None) -> int:
        """Adds a sequence; the host does not wait for the device.

        Args:
            prefix: prefilled captions, of which the sequence reads number `request.prefix_index`.
            init_tokens: (N,) image tokens that are given instead of sampled, -1 where to sample.

        Returns:
            The sequence's slot.

        Raises:
            InputError: no such caption; guidance without `null_prefix`; too few free slots. Nothing has changed then.
        """
        if not 0 <= request.prefix_index < prefix.num_captions:
            raise InputError("prefix_index", request.prefix_index, f"there are {prefix.num_captions} captions, from 0")
        is_guided, scale = request.sampling_params.is_guided, request.sampling_params.guidance_scale
        if is_guided and self._null_ref is None:
            raise InputError("guidance_scale", scale, "needs the empty caption's tokens")
        if self.num_free < 1 + is_guided:
            raise InputError("slots", self.num_slots, f"{1 + is_guided} needed and {self.num_free} free: wait")
        free = (slot for slot in range(self.num_slots) if slot not in self.prefix_refs)
        slot, unconditional_slot = next(free), None
        if is_guided:
            assert self._null_ref is not None
            unconditional_slot = next(free)
            self.prefix_refs[unconditional_slot] = self._null_ref
        self.prefix_refs[slot] = PrefixRef(prefix, request.prefix_index)
        if init_tokens is None:
            self.init_tokens[slot] = -1
        else:
            must_travel = self.init_tokens.is_cuda and not init_tokens.is_cuda
            self.init_tokens[slot].copy_(init_tokens.pin_memory() if must_travel else init_tokens, non_blocking=True)
        self.sequences[slot] = SequenceState(request, unconditional_slot, 0, has_init_tokens=init_tokens is not None)
        self.version += 1
        return slot

    def remove(self, slot: int) -> Tensor:
        """Removes a sequence, finished or not.

        Returns:
            (n,) the tokens that it has so far, all N when it is finished.
        """
        tokens = self.tokens_of(slot).clone()
        for own in self.slots_of(slot):
            del self.prefix_refs[own]
        del self.sequences[slot]
        self.version += 1
        return tokens

    def advance(self, slot: int, count: int) -> bool:
        """Counts `count` tokens more. True: the sequence is finished."""
        state = self.sequences[slot]
        state.position += count
        is_finished = state.position == self.num_image_tokens
        self.version += is_finished
        return is_finished

    def unfinished(self) -> list[int]:
        """The slots of the sequences that are not finished, in ascending order."""
        return sorted(slot for slot, state in self.sequences.items() if state.position < self.num_image_tokens)

    def slots_of(self, slot: int) -> list[int]:
        """The slot of a sequence and, with guidance, that of its unconditional sequence."""
        unconditional = self.sequences[slot].unconditional_slot
        return [slot] if unconditional is None else [slot, unconditional]

    def num_tokens(self, slot: int) -> int:
        """Tokens that a sequence has so far."""
        return self.sequences[slot].position

    def tokens_of(self, slot: int) -> Tensor:
        """(n,) tokens that a sequence has so far; a view, overwritten once the slot is given to another."""
        return self.tokens[slot, : self.sequences[slot].position]
