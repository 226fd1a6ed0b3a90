"""What every decoder is: sequences in a slot table, added and removed between any two steps, each at its own position.

n tokens that a sequence has so far, N image tokens.
"""

from abc import abstractmethod
from typing import Protocol

from torch import Tensor

from engine.decoding.kv_cache import Prefix
from engine.decoding.slot_table import SlotTable
from engine.sampling_params import SequenceRequest


class Decoder(Protocol):
    """Sequences in flight.

    A decoder that names this protocol as its base says what adding, removing and a step are; what callers ask beside is
    answered here, from its table.
    """

    table: SlotTable

    @abstractmethod
    def add(self, prefix: Prefix, request: SequenceRequest, *, init_tokens: Tensor | None = None) -> int:
        """Adds a sequence and returns its slot; see `SlotTable.add`."""

    @abstractmethod
    def remove(self, slot: int) -> Tensor:
        """Removes a sequence, finished or not, and returns its (n,) tokens so far; see `SlotTable.remove`."""

    @abstractmethod
    def step(self) -> list[int]:
        """Gives every unfinished sequence at least one token and returns the slots of those that finished."""

    def read_init_tokens(self) -> None:
        """To be called between adding sequences that all start now and the first step: takes init tokens that all begin with.

        They may be read several a pass; decoders that read them as fast in their steps do nothing here.
        """
        return None

    @property
    def num_slots(self) -> int:
        return self.table.num_slots

    @property
    def num_sequences(self) -> int:
        """Sequences that have not been removed, finished ones included."""
        return self.table.num_sequences

    @property
    def num_free(self) -> int:
        """Free slots; a guided sequence needs two."""
        return self.table.num_free

    def num_tokens(self, slot: int) -> int:
        """Tokens that a sequence has so far; cheaper than a view of them."""
        return self.table.num_tokens(slot)

    def tokens(self, slot: int) -> Tensor:
        """(n,) tokens that a sequence has so far; a view, overwritten once it is removed."""
        return self.table.tokens_of(slot)
