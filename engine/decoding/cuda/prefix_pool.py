"""The captions that the sequences in flight read, on the device: each is copied in once, however many read it.

L layers, M entries, P prefix positions, H heads, D head dim.

    entry 0   [ empty caption ]      permanent, when there is one
    entry 1   [ caption a     ]      held by 16 sequences
    entry 2   [               ]      free
    entry 3   [ caption b     ]      held by 1 sequence

A kernel finds a sequence's prefix by the number of its entry, read from the device, so a captured step serves any
captions. A copy of 129 positions is 4.2 MB at the published size (16 bit).
"""

import torch
from torch import Tensor

from engine.decoding.kv_cache import Prefix, PrefixRef
from engine.errors import InputError


class PrefixPool:
    """Captions in entries, reference-counted by the sequences that read them.

    Args:
        num_captions: entries beside that of the empty caption.
        prefix_shape: (L, P, H, D).
        null_prefix: the empty caption, prefilled.
    """

    def __init__(
        self,
        num_captions: int,
        prefix_shape: tuple[int, int, int, int],
        *,
        null_prefix: Prefix | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        L, P, H, D = prefix_shape
        self.num_captions = num_captions
        # Heads before positions in memory, as in the cache. Zeros: free slots read entry 0.
        self._keys = torch.zeros(L, 1 + num_captions, H, P, D, dtype=dtype, device=device).transpose(2, 3)
        self._values = torch.zeros_like(self._keys)
        self._free = list(range(num_captions, 0, -1))
        self._entry_of: dict[PrefixRef, int] = {}
        self._num_holders: dict[int, int] = {}
        if null_prefix is not None:
            ref = PrefixRef(null_prefix, 0)
            self._entry_of[ref] = 0
            self._num_holders[0] = 1  # never released
            self._copy(ref, 0)

    @property
    def num_free(self) -> int:
        """Captions that there is room for."""
        return len(self._free)

    def keys(self, layer: int) -> Tensor:
        """(M, P, H, D); a view."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """(M, P, H, D); a view."""
        return self._values[layer]

    def hold(self, ref: PrefixRef) -> int:
        """Copies a caption in, unless it is there, and counts its new holder.

        Returns:
            Its entry.

        Raises:
            InputError: no entry is free.
        """
        entry = self._entry_of.get(ref)
        if entry is None:
            if not self._free:
                raise InputError("captions", self.num_captions, "all entries are taken: wait, or make room for more")
            entry = self._entry_of[ref] = self._free.pop()
            self._num_holders[entry] = 0
            self._copy(ref, entry)
        self._num_holders[entry] += 1
        return entry

    def release(self, ref: PrefixRef) -> None:
        """Counts one holder less; the last one frees the entry. Its contents stay there, unread, until it is reused."""
        entry = self._entry_of[ref]
        self._num_holders[entry] -= 1
        if not self._num_holders[entry]:
            del self._entry_of[ref], self._num_holders[entry]
            self._free.append(entry)

    def _copy(self, ref: PrefixRef, entry: int) -> None:
        """Queued behind the steps that still read what was there before; the host waits for neither."""
        self._keys[:, entry] = ref.keys
        self._values[:, entry] = ref.values
