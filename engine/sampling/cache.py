"""Keys and values of what was already read: a caption's part once per caption, a candidate's part in its own row.

L layers, G captions, B rows, H heads, D head dim, P prefix positions (<bos> + text), N slots, n siblings.

    row 0 (caption 0)   [ prefix 0, shared ][ own tokens ........ ]
    row 1 (caption 0)   [        "         ][ own tokens ........ ]
    row 2 (caption 1)   [ prefix 1, shared ][ own tokens ........ ]
                          P positions         N slots, filled in step

Scores against both parts go through one softmax, so the result is that of plain attention over the whole row. A
prefix is read once for all its siblings (one matrix product of their stacked queries), instead of once a row: at 16
rows of one caption that saves a third of the cache's bytes, and 16-fold prefill.

Every tensor reads as (..., T, H, D); in memory H lies before T, because a matrix product over (row, head) would
otherwise copy the whole cache each step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A product of one or two query rows takes another BLAS kernel than one of 3 to 64 and differs in the last bit
# (measured, MKL 2024.2, float32 and bfloat16): rounding siblings up to 4 keeps a row's result free of its company.
_SIBLINGS_MULTIPLE = 4
_SIBLINGS_MAX = 64


@dataclass(frozen=True)
class Prefix:
    """What decoding needs of G captions.

    keys, values: (L, G, P, H, D). hidden: (G, C), the last position's output, which predicts the first image token.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor

    @property
    def num_captions(self) -> int:
        return self.hidden.shape[0]

    def join(self, other: "Prefix") -> "Prefix":
        """The captions of both, this one's first."""
        return Prefix(
            _join(self.keys, other.keys), _join(self.values, other.values), torch.cat([self.hidden, other.hidden])
        )


@dataclass(frozen=True)
class _Siblings:
    """Captions with equally many rows (after padding): their prefix parts are one batched product."""

    rows: Tensor  # (g, n) row of each sibling; a short group repeats its last row
    keys: Tensor  # (L, g, H, P, D)
    values: Tensor  # (L, g, H, P, D)


class KVCache:
    """Preallocated cache of B rows with fixed slots.

    Args:
        prefix: the captions.
        caption_of_row: for each row, its index into `prefix`; any order.
        num_slots: N, how many tokens a row may hold.
    """

    def __init__(self, prefix: Prefix, caption_of_row: list[int], num_slots: int) -> None:
        L, _, _, H, D = prefix.keys.shape
        self._scale = D**-0.5
        self._siblings = _group(prefix, caption_of_row)
        grouped = torch.cat([group.rows.flatten() for group in self._siblings])
        first_place = {row: place for place, row in reversed(list(enumerate(grouped.tolist())))}
        places = [first_place[row] for row in range(len(caption_of_row))]
        self._place_of_row = torch.tensor(places, device=grouped.device)  # (B,) into the groups, laid end to end
        shape = (L, len(caption_of_row), H, num_slots, D)
        self._keys = torch.empty(shape, dtype=prefix.keys.dtype, device=prefix.keys.device)
        self._values = torch.empty_like(self._keys)

    @property
    def keys(self) -> Tensor:
        """(L, B, N, H, D); slots that were never written hold anything."""
        return self._keys.transpose(2, 3)

    @property
    def values(self) -> Tensor:
        """(L, B, N, H, D); slots that were never written hold anything."""
        return self._values.transpose(2, 3)

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Stores k, v (B, H, D) in `slot` of every row."""
        self._keys[layer, :, :, slot] = k
        self._values[layer, :, :, slot] = v

    def attend(self, layer: int, q: Tensor, num_filled: int) -> Tensor:
        """Attention of one query a row over its prefix and its first `num_filled` slots.

        Args:
            q: (B, H, D).

        Returns:
            (B, H, D) in q's dtype; softmax in float32 or better.
        """
        q = q * self._scale
        own_keys = self._keys[layer, :, :, :num_filled]  # (B, H, t, D)
        own_values = self._values[layer, :, :, :num_filled]
        prefix_scores = self._per_row(
            [q[group.rows].transpose(1, 2) @ group.keys[layer].transpose(2, 3) for group in self._siblings]
        )  # (B, H, P)
        own_scores = (q[:, :, None] @ own_keys.transpose(2, 3))[:, :, 0]  # (B, H, t)
        scores = torch.cat([prefix_scores, own_scores], dim=2)
        weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(2).to(q.dtype)  # (B, H, P + t)
        P = prefix_scores.shape[2]
        from_own = (weights[:, :, None, P:] @ own_values)[:, :, 0]  # (B, H, D)
        from_prefix = self._per_row(
            [weights[group.rows, :, :P].transpose(1, 2) @ group.values[layer] for group in self._siblings]
        )  # (B, H, D)
        return from_prefix + from_own

    def _per_row(self, grouped: list[Tensor]) -> Tensor:
        """Results (g, H, n, x) of each group -> (B, H, x)."""
        laid_out = [result.transpose(1, 2).flatten(0, 1) for result in grouped]  # (g * n, H, x)
        return (laid_out[0] if len(laid_out) == 1 else torch.cat(laid_out))[self._place_of_row]


def empty_prefix(L: int, G: int, P: int, H: int, D: int, C: int, *, dtype: torch.dtype, device: torch.device) -> Prefix:
    """Room for G captions, to be filled by prefill; heads before positions in memory."""
    keys = torch.empty(L, G, H, P, D, dtype=dtype, device=device).transpose(2, 3)
    return Prefix(keys, torch.empty_like(keys), torch.empty(G, C, dtype=dtype, device=device))


def _join(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a.transpose(2, 3), b.transpose(2, 3)], dim=1).transpose(2, 3)


def _group(prefix: Prefix, caption_of_row: list[int]) -> list[_Siblings]:
    """Rows by caption, captions by (padded) number of rows: usually one group, two with guidance."""
    rows_of: dict[int, list[int]] = {}
    for row, caption in enumerate(caption_of_row):
        rows_of.setdefault(caption, []).append(row)
    by_size: dict[int, list[tuple[int, list[int]]]] = {}
    for caption, rows in rows_of.items():
        for start in range(0, len(rows), _SIBLINGS_MAX):
            part = rows[start : start + _SIBLINGS_MAX]
            size = -(-len(part) // _SIBLINGS_MULTIPLE) * _SIBLINGS_MULTIPLE
            by_size.setdefault(size, []).append((caption, part + part[-1:] * (size - len(part))))
    device = prefix.keys.device
    groups = []
    for entries in by_size.values():
        captions = torch.tensor([caption for caption, _ in entries], device=device)
        keys = prefix.keys.transpose(2, 3).index_select(1, captions)  # (L, g, H, P, D)
        values = prefix.values.transpose(2, 3).index_select(1, captions)
        groups.append(_Siblings(torch.tensor([rows for _, rows in entries], device=device), keys, values))
    return groups
