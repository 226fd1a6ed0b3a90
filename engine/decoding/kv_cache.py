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
    keys: list[Tensor]  # one a layer: (g * H, D, P)
    values: list[Tensor]  # one a layer: (g * H, P, D)
    first: int | None  # the first row, where all rows follow one another

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Rows (R, H, x) by matrices (g * H, x, y) -> (g * n, H, y)."""
        g, n = self.rows.shape
        taken = rows[self.rows] if self.first is None else rows[self.first : self.first + g * n].unflatten(0, (g, n))
        # Always laid out anew: a product of strided rows may take another BLAS kernel (seen in bfloat16).
        chosen = taken.transpose(1, 2).contiguous().flatten(0, 1)  # (g * H, n, x)
        return torch.bmm(chosen, matrices).unflatten(0, (g, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _Step:
    """What all layers of a step share."""

    rows: Tensor  # (R,)
    split: Tensor  # (R,) where each row's new position goes
    place: Tensor  # (R,)
    hidden: Tensor  # (S, R, 1, split), 0 or -inf
    scores: Tensor  # (S, R * H, 1, split), to write to


@dataclass(frozen=True)
class Views:
    """The cache's splits as matrices, made once for as long as R and S stay: 80 views a layer and step otherwise."""

    num_rows: int
    num_splits: int
    keys: list[list[Tensor]]  # layer, split: (R * H, D, split)
    values: list[list[Tensor]]  # layer, split: (R * H, split, D)

    @staticmethod
    def of(own: Tensor, num_rows: int, num_splits: int) -> "Views":
        keys, values = (
            [[split[:num_rows].flatten(0, 1) for split in layer[:num_splits]] for layer in part] for part in own
        )
        keys = [[split.transpose(1, 2) for split in layer] for layer in keys]
        return Views(num_rows, num_splits, keys, values)


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
        self._views: Views | None = None
        self._step: _Step | None = None
        self._wide = torch.promote_types(dtype, torch.float32)
        self._siblings: list[_Siblings] = []
        self._place_of_row: Tensor | None = None
        self.split = min(_SPLIT, _round_up(max(num_positions, 1), 16))
        num_splits = -(-max(num_positions, 1) // self.split)
        # Keys, then values. Zeros: what nobody wrote is multiplied by zero, and zero times a stray nan is nan. Written
        # here and now, since torch.zeros leaves the pages to be made one by one in the steps (0.25 ms a layer).
        self._own = torch.empty(2, L, num_splits, num_rows, H, self.split, D, dtype=dtype, device=device).zero_()
        self._places = torch.arange(num_splits * self.split, device=device).view(num_splits, 1, 1, self.split)
        self._rows = torch.arange(num_rows, device=device)

    def own(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row's own positions, each (L, positions, H, D); copies."""
        both = self._own[:, :, :, row].transpose(3, 4).flatten(2, 3)  # (2, L, positions, H, D)
        return both[0], both[1]

    def copy_row(self, row: int, source: "KVCache", source_row: int) -> None:
        """Takes over a row's own positions from a cache of as many positions a row."""
        self._own[:, :, :, row] = source._own[:, :, :, source_row]

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
        is_in_order = laid_out == list(range(highest + 1))
        self._place_of_row = None if is_in_order else torch.tensor(laid_out, device=self._rows.device)

    def begin_step(self, lengths: Tensor, longest: int) -> None:
        """Says how many own positions the first R rows hold before this step: (R,), and the most of any."""
        R, S = len(lengths), longest // self.split + 1
        if self._views is None or (self._views.num_rows, self._views.num_splits) != (R, S):
            self._views = Views.of(self._own, R, S)
        _, _, _, _, H, split, _ = self._own.shape
        self._step = _Step(
            rows=self._rows[:R],
            split=lengths // split,
            place=lengths % split,
            # a row sees what it holds and the position that is appended now
            hidden=torch.where(self._places[:S] > lengths[:, None, None], -torch.inf, 0.0),
            scores=self._own.new_empty(S, R * H, 1, split),
        )

    def append_and_attend(self, layer: int, qkv: Tensor) -> Tensor:
        """One position of each row: its key and value are kept, its query reads the prefix and all own positions.

        Args:
            qkv: (R, 3, H, D), of the rows of `begin_step`; queries divided by sqrt(D).

        Returns:
            (R, H, D) in qkv's dtype; softmax in float32 or better.
        """
        step, views = self._step, self._views
        assert step is not None
        assert views is not None
        self._own[:, layer][:, step.split, step.rows, :, step.place] = qkv[:, 1:]
        q = qkv[:, 0]
        R, H, D = q.shape
        prefix_scores = self._per_row([group.multiply(q, group.keys[layer]) for group in self._siblings], R)
        prefix_scores = prefix_scores.to(self._wide)  # (R, H, P)
        per_head = q.reshape(R * H, 1, D)
        for scores, keys in zip(step.scores, views.keys[layer], strict=True):
            torch.bmm(per_head, keys, out=scores)
        own_scores = step.scores.view(-1, R, H, self.split) + step.hidden  # (S, R, H, split), float32 or better
        highest = torch.maximum(prefix_scores.amax(2), own_scores.amax(3).amax(0))[:, :, None]  # (R, H, 1)
        prefix_weights = (prefix_scores - highest).exp_()
        own_weights = own_scores.sub_(highest).exp_()
        total = prefix_weights.sum(2)
        for part in own_weights.sum(3):
            total = total + part  # (R, H)
        weights = own_weights.to(q.dtype).view_as(step.scores)
        prefix_weights = prefix_weights.to(q.dtype)
        result = self._per_row([group.multiply(prefix_weights, group.values[layer]) for group in self._siblings], R)
        for split_weights, values in zip(weights, views.values[layer], strict=True):
            result = result + torch.bmm(split_weights, values).view(R, H, D)
        return (result / total[:, :, None]).to(q.dtype)

    def _per_row(self, grouped: list[Tensor], num_rows: int) -> Tensor:
        """Results (g * n, H, x) of each group -> (R, H, x); rows without a caption repeat another's."""
        rows = grouped[0] if len(grouped) == 1 else torch.cat(grouped)
        if self._place_of_row is not None:
            rows = rows[self._place_of_row]
        missing = num_rows - rows.shape[0]
        if missing <= 0:
            return rows[:num_rows]
        return torch.cat([rows, rows[:1].expand(missing, -1, -1)])


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
    return [
        _siblings([caption for caption, _ in entries], [rows for _, rows in entries]) for entries in by_size.values()
    ]


def _siblings(captions: list[Caption], rows: list[list[int]]) -> _Siblings:
    keys = torch.stack([caption.prefix.keys[:, caption.index].transpose(1, 2) for caption in captions], dim=1)
    values = torch.stack([caption.prefix.values[:, caption.index].transpose(1, 2) for caption in captions], dim=1)
    in_order = [row for part in rows for row in part]
    follow_one_another = in_order == list(range(in_order[0], in_order[0] + len(in_order)))
    return _Siblings(
        rows=torch.tensor(rows, device=keys.device),
        keys=list(keys.flatten(1, 2).transpose(2, 3)),  # (L, g, H, P, D) -> L x (g * H, D, P)
        values=list(values.flatten(1, 2)),
        first=in_order[0] if follow_one_another else None,
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
