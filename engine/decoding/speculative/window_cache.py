"""The KV cache with a window of positions worked at once, for rows whose next tokens are guessed.

L layers, R rows, H heads, D head dim, P prefix positions, N own positions, w window, S splits read.

    row 0   [ prefix, shared ][ own positions ....][ w new ones: each sees those before it and itself ]

New positions are written over whatever a wrong guess left there. Positions past the row's end go to a spare row.

A position's result has the same bits as `KVCache` gives it alone: its products over own positions are made by the same
BLAS kernel (one query each; a product of w queries would take another one, whose sums end on other last bits), and
everything else is elementwise or sums along one row. At the published sizes that takes 13 ms of a pass of 16 queries,
where one product of all 16 would take 1.4 ms (two cores, 128 own positions, the pass 133 ms).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decoding.kv_cache import Caption, KVCache, Views


@dataclass(frozen=True)
class _Pass:
    """What all layers of a pass share."""

    rows: Tensor  # (R, w), the spare row for positions past the end
    split: Tensor  # (R, w) where each new position goes
    place: Tensor  # (R, w)
    hidden: Tensor  # (S, R, w, 1, split), 0 or -inf
    scores: Tensor  # (S, w, R * H, 1, split), to write to
    results: Tensor  # (S, w, R * H, 1, D), to write to


class WindowCache(KVCache):
    """Args:
    num_rows, num_positions, prefix_shape, dtype, device: see `KVCache`.
    window: w.
    """

    def __init__(
        self,
        num_rows: int,
        num_positions: int,
        prefix_shape: tuple[int, int, int, int],
        *,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_rows + 1, num_positions, prefix_shape, dtype=dtype, device=device)
        self._num_positions = num_positions
        self._offsets = torch.arange(window, device=device)
        self._pass: _Pass | None = None

    def seat(self, caption_of_row: Mapping[int, Caption]) -> None:
        """As `KVCache.seat`; a row's w queries are siblings."""
        w = len(self._offsets)
        super().seat({row * w + offset: caption for row, caption in caption_of_row.items() for offset in range(w)})

    def begin_step(self, lengths: Tensor, longest: int) -> None:
        """Says how many own positions the first R rows hold before their window: (R,), and the most of any."""
        held = lengths[:, None] + self._offsets  # (R, w) before each new position
        inside = held < self._num_positions
        held = held.clamp(max=self._num_positions - 1)
        R, w = held.shape
        S = (min(longest + w, self._num_positions) - 1) // self.split + 1
        if self._views is None or (self._views.num_rows, self._views.num_splits) != (R, S):
            self._views = Views.of(self._own, R, S)
        H, D = self._own.shape[4], self._own.shape[6]
        hides = self._places[:S, :, None] > held[:, :, None, None]  # (S, R, w, 1, split)
        self._pass = _Pass(
            rows=torch.where(inside, self._rows[:R, None], len(self._rows) - 1),
            split=held // self.split,
            place=held % self.split,
            hidden=torch.where(hides, -torch.inf, 0.0),
            scores=self._own.new_empty(S, w, R * H, 1, self.split),
            results=self._own.new_empty(S, w, R * H, 1, D),
        )

    def append_and_attend(self, layer: int, qkv: Tensor) -> Tensor:
        """w positions of each row: their keys and values are kept, each query reads the prefix and what is before it.

        Args:
            qkv: (R, w, 3, H, D), of the rows of `begin_step`; queries divided by sqrt(D).

        Returns:
            (R, w, H, D) in qkv's dtype; softmax in float32 or better.
        """
        now, views = self._pass, self._views
        assert now is not None
        assert views is not None
        self._own[:, layer][:, now.split, now.rows, :, now.place] = qkv[:, :, 1:]
        R, w, _, H, D = qkv.shape
        q = qkv[:, :, 0].flatten(0, 1)  # (R * w, H, D)
        prefix_scores = self._per_row([group.multiply(q, group.keys[layer]) for group in self._siblings], R * w)
        prefix_scores = prefix_scores.to(self._wide)  # (R * w, H, P)
        by_offset = qkv[:, :, 0].transpose(0, 1).reshape(w, R * H, 1, D)
        for scores, keys in zip(now.scores, views.keys[layer], strict=True):
            for one, query in zip(scores, by_offset, strict=True):
                torch.bmm(query, keys, out=one)
        own_scores = now.scores.view(-1, w, R, H, self.split).transpose(1, 2) + now.hidden
        own_scores = own_scores.flatten(1, 2)  # (S, R * w, H, split), float32 or better
        highest = torch.maximum(prefix_scores.amax(2), own_scores.amax(3).amax(0))[:, :, None]  # (R * w, H, 1)
        prefix_weights = (prefix_scores - highest).exp_()
        own_weights = own_scores.sub_(highest).exp_()
        total = prefix_weights.sum(2)
        for part in own_weights.sum(3):
            total = total + part  # (R * w, H)
        prefix_weights = prefix_weights.to(q.dtype)
        weights = own_weights.to(q.dtype).unflatten(1, (R, w)).transpose(1, 2).reshape(now.scores.shape)
        result = self._per_row([group.multiply(prefix_weights, group.values[layer]) for group in self._siblings], R * w)
        for results, split_weights, values in zip(now.results, weights, views.values[layer], strict=True):
            for one, weight in zip(results, split_weights, strict=True):
                torch.bmm(weight, values, out=one)
        for part in now.results.view(-1, w, R, H, D).transpose(1, 2).flatten(1, 2):
            result = result + part  # (R * w, H, D)
        return (result / total[:, :, None]).to(q.dtype).unflatten(0, (R, w))
