"""Keys and values of what was already read: a caption's part once per caption, a candidate's part in its own slot.

L layers, G captions, R rows, H heads, D head dim, P prefix positions (<bos> + text), N own positions, n siblings.

    row 0 (caption 0)   [ prefix 0, shared ][ own tokens ........ ]    length 7
    row 1 (caption 0)   [        "         ][ own tokens .. ]          length 3: it joined later
    row 2               [                  ]                           nobody: computes rubbish that nobody reads
    row 3 (caption 1)   [ prefix 1, shared ][ own tokens ........ ]
                          P positions         N positions, each row at its own length

Scores against both parts go through one softmax, so the result is that of plain attention over the whole row. A
prefix is read once for all its siblings (one matrix product of their stacked queries), instead of once a row: at 16
rows of one caption that saves a third of the cache's bytes, and 16-fold prefill.

A row's result must not depend on its neighbours, and rows of one step have different lengths. So own positions are
worked in splits of a fixed size, summed in ascending order: a split beyond a row's length adds exact zeros.

Every tensor reads as (..., T, H, D); in memory H lies before T, because a matrix product over (row, head) would
otherwise copy the whole cache each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A product of one or two query rows takes another BLAS kernel than one of 3 to 64 and differs in the last bit
# (measured, MKL 2024.2, float32 and bfloat16): rounding siblings up to 4 keeps a row's result free of its company.
_SIBLINGS_MULTIPLE = 4
_SIBLINGS_MAX = 64
# Own positions of one product. Longer splits mean fewer products, and more positions read that hold nothing yet.
_SPLIT = 64


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class Caption:
    """One caption of a prefix; equal when it is the same one of the same object."""

    prefix: Prefix
    index: int


@dataclass(frozen=True)
class _Siblings:
    """Captions with equally many rows (after padding): their prefix parts are one batched product."""

    rows: Tensor  # (g, n) row of each sibling; a short group repeats its last row
    keys: Tensor  # (L, g, H, P, D)
    values: Tensor  # (L, g, H, P, D)


class KVCache:
    """Preallocated cache of rows that come and go.

    Args:
        num_rows: how many rows there is room for.
        num_positions: N, how many own positions a row may fill.
        prefix_shape: (L, P, H, D).
    """

    def __init__(
        self,
        num_rows: int,
        num_positions: int,
        prefix_shape: tuple[int, int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        L, _, H, D = prefix_shape
        self._scale = D**-0.5
        self._siblings: list[_Siblings] = []
        self._place_of_row = torch.empty(0, dtype=torch.int64, device=device)
        self.split = min(_SPLIT, _round_up(max(num_positions, 1), 16))
        # zeros: what nobody wrote is multiplied by zero, and zero times a stray nan is nan
        shape = (L, num_rows, H, _round_up(max(num_positions, 1), self.split), D)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._places = torch.arange(shape[3], device=device)
        self._rows = torch.arange(num_rows, device=device)

    @property
    def keys(self) -> Tensor:
        """(L, rows, positions, H, D)."""
        return self._keys.transpose(2, 3)

    @property
    def values(self) -> Tensor:
        """(L, rows, positions, H, D)."""
        return self._values.transpose(2, 3)

    def seat(self, caption_of_row: Mapping[int, Caption]) -> None:
        """Says which rows are read from now on, and of which captions; call it when that changes.

        Rows that are not named compute rubbish until they are.
        """
        self._siblings = _group(caption_of_row)
        places: dict[int, int] = {}
        for place, row in enumerate(row for group in self._siblings for row in group.rows.flatten().tolist()):
            places.setdefault(row, place)
        highest = max(places, default=-1)
        laid_out = [places.get(row, 0) for row in range(highest + 1)]
        self._place_of_row = torch.tensor(laid_out, dtype=torch.int64, device=self._places.device)

    def write(self, layer: int, lengths: Tensor, k: Tensor, v: Tensor) -> None:
        """Appends k, v (R, H, D) to the first R rows, which hold `lengths` (R,) positions before."""
        rows = self._rows[: len(lengths)]
        self._keys[layer, rows, :, lengths] = k
        self._values[layer, rows, :, lengths] = v

    def attend(self, layer: int, q: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Attention of one query a row over its prefix and its own positions.

        Args:
            q: (R, H, D), of the first R rows.
            lengths: (R,) own positions that each row may see.
            longest: their maximum, or more: how far to read.

        Returns:
            (R, H, D) in q's dtype; softmax in float32 or better.
        """
        R, wide = q.shape[0], torch.promote_types(q.dtype, torch.float32)
        q = q * self._scale
        splits = [slice(start, start + self.split) for start in range(0, longest, self.split)]
        prefix_scores = self._per_row(
            [q[group.rows].transpose(1, 2) @ group.keys[layer].transpose(2, 3) for group in self._siblings], R
        )  # (R, H, P)
        own_scores = [
            (q[:, :, None] @ self._keys[layer, :R, :, split].transpose(2, 3))[:, :, 0].to(wide) for split in splits
        ]  # S x (R, H, split)
        hidden = self._places >= lengths[:, None]  # (R, positions)
        parts = [prefix_scores.to(wide)]
        parts += [
            scores.masked_fill(hidden[:, None, split], -torch.inf)
            for scores, split in zip(own_scores, splits, strict=True)
        ]
        highest = torch.stack([part.amax(2) for part in parts]).amax(0)[:, :, None]  # (R, H, 1)
        parts = [(part - highest).exp_() for part in parts]
        total = parts[0].sum(2, keepdim=True)
        for part in parts[1:]:
            total = total + part.sum(2, keepdim=True)
        weights = [(part / total).to(q.dtype) for part in parts]
        result = self._per_row(
            [weights[0][group.rows].transpose(1, 2) @ group.values[layer] for group in self._siblings], R
        )  # (R, H, D)
        for weight, split in zip(weights[1:], splits, strict=True):
            result = result + (weight[:, :, None] @ self._values[layer, :R, :, split])[:, :, 0]
        return result

    def _per_row(self, grouped: list[Tensor], num_rows: int) -> Tensor:
        """Results (g, H, n, x) of each group -> (R, H, x); rows without a caption repeat another's."""
        laid_out = [result.transpose(1, 2).flatten(0, 1) for result in grouped]  # (g * n, H, x)
        rows = (laid_out[0] if len(laid_out) == 1 else torch.cat(laid_out))[self._place_of_row]
        missing = num_rows - rows.shape[0]
        return torch.cat([rows, rows[:1].expand(missing, -1, -1)]) if missing else rows


def empty_prefix(L: int, G: int, P: int, H: int, D: int, C: int, *, dtype: torch.dtype, device: torch.device) -> Prefix:
    """Room for G captions, to be filled by prefill; heads before positions in memory."""
    keys = torch.empty(L, G, H, P, D, dtype=dtype, device=device).transpose(2, 3)
    return Prefix(keys, torch.empty_like(keys), torch.empty(G, C, dtype=dtype, device=device))


def _group(caption_of_row: Mapping[int, Caption]) -> list[_Siblings]:
    """Rows by caption, captions by (padded) number of rows: usually one group, two with guidance."""
    rows_of: dict[Caption, list[int]] = {}
    for row, caption in sorted(caption_of_row.items()):
        rows_of.setdefault(caption, []).append(row)
    by_size: dict[int, list[tuple[Caption, list[int]]]] = {}
    for caption, rows in rows_of.items():
        for start in range(0, len(rows), _SIBLINGS_MAX):
            part = rows[start : start + _SIBLINGS_MAX]
            size = _round_up(len(part), _SIBLINGS_MULTIPLE)
            by_size.setdefault(size, []).append((caption, part + part[-1:] * (size - len(part))))
    groups = []
    for entries in by_size.values():
        keys = torch.stack([caption.prefix.keys.transpose(2, 3)[:, caption.index] for caption, _ in entries], dim=1)
        values = torch.stack([caption.prefix.values.transpose(2, 3)[:, caption.index] for caption, _ in entries], dim=1)
        groups.append(_Siblings(torch.tensor([rows for _, rows in entries], device=keys.device), keys, values))
    return groups


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
