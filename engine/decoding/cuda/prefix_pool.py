"""Room on the device for the captions that rows in flight read: each is copied in once, however many rows read it.

L layers, M places, P prefix positions, H heads, D head dim.

    place 0   [ empty caption ]      for good, when there is one
    place 1   [ caption a     ]      held by 16 rows
    place 2   [               ]      free
    place 3   [ caption b     ]      held by 1 row

A kernel finds a row's prefix by its place, read from the device, so a captured step serves any captions. A copy of 129
positions is 4.2 MB at the published size (16 bit).
"""

import torch
from torch import Tensor

from engine.decoding.kv_cache import Caption, Prefix
from engine.errors import InputError


class PrefixPool:
    """Captions in places, counted by how many rows hold them.

    Args:
        num_captions: places beside that of the empty caption.
        prefix_shape: (L, P, H, D).
        null_prefix: the empty caption, read.
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
        # Heads before positions in memory, as the cache; zeros, for rows that nobody has read place 0.
        self._keys = torch.zeros(L, 1 + num_captions, H, P, D, dtype=dtype, device=device).transpose(2, 3)
        self._values = torch.zeros_like(self._keys)
        self._free = list(range(num_captions, 0, -1))
        self._place_of: dict[Caption, int] = {}
        self._holders: dict[int, int] = {}
        if null_prefix is not None:
            caption = Caption(null_prefix, 0)
            self._place_of[caption] = 0
            self._holders[0] = 1  # never given up
            self._copy(caption, 0)

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

    def hold(self, caption: Caption) -> int:
        """Copies a caption in, unless it is there, and counts its new holder.

        Returns:
            Its place.

        Raises:
            InputError: no place is free.
        """
        place = self._place_of.get(caption)
        if place is None:
            if not self._free:
                raise InputError("captions", self.num_captions, "all places are taken: wait, or make room for more")
            place = self._place_of[caption] = self._free.pop()
            self._holders[place] = 0
            self._copy(caption, place)
        self._holders[place] += 1
        return place

    def release(self, caption: Caption) -> None:
        """Takes one holder off; the last one frees the place. What it held stays there, unread, until it is reused."""
        place = self._place_of[caption]
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._place_of[caption], self._holders[place]
            self._free.append(place)

    def _copy(self, caption: Caption, place: int) -> None:
        """Queued behind the steps that still read what was there before; the host waits for neither."""
        self._keys[:, place] = caption.prefix.keys[:, caption.index]
        self._values[:, place] = caption.prefix.values[:, caption.index]
