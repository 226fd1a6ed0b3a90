"""The KV cache: a caption's keys and values once per caption, each sequence's own in its slot.

L layers, G captions, R sequences computed, w window, H heads, D head dim, P prefix positions (<bos> + text), N own
positions, S splits of them, g groups, n siblings (queries on one prefix).

    slot 0 (caption 0)   [ prefix 0, shared ][ own tokens ........ ]    length 7
    slot 1 (caption 0)   [        "         ][ own tokens .. ]          length 3: added later
    slot 2               [                  ]                           free: its result is never read
    slot 3 (caption 1)   [ prefix 1, shared ][ own tokens ........ ]
                           P positions         N positions, each sequence at its own length

A step computes a window of w consecutive positions of each sequence: 1, or more in speculative decoding. Scores against
both parts go through one softmax, so the result is that of plain attention over the whole sequence. A prefix is read
once for all its siblings (one matrix product of their stacked queries) instead of once a sequence: at 16 sequences of
one caption that saves a third of the cache's bytes, and 16-fold prefill.

A position's result must have the same bits whatever the batch and the window, and sequences have different lengths. So
own positions are computed in splits of a fixed size, summed in ascending order: a split beyond a sequence's length adds
exact zeros. Products over own positions have one query each (a product of w queries takes another BLAS kernel, whose
sums end on other last bits); everything else is elementwise or sums along one row. At the published sizes that takes
13 ms of a pass of 16 queries, where one product of all 16 would take 1.4 ms (two cores, 128 own positions, the pass
133 ms).

A layer with a pattern of attention reads only the splits that hold what its queries may read, and keeps its positions where that
are few splits (engine/decoding/pattern_places.py).

Every tensor reads as (..., T, H, D); in memory H lies before T, because a matrix product over (sequence, head) would
otherwise copy the whole cache each step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.config.transformer import AttentionPattern, TransformerConfig
from engine.decoding.pattern_places import PatternPlaces, pattern_places
from engine.decoding.shift_cache import ShiftCache

# A product of one or two query rows takes another BLAS kernel than one of 3 to 64 and differs in the last bit
# (measured, MKL 2024.2, float32 and bfloat16): rounding siblings up to 4 keeps a result independent of the batch.
_SIBLINGS_MULTIPLE = 4
_SIBLINGS_MAX = 64
# Products with a prefix of fewer positions, a class for one, differ by the number of their rows as well: each has 4.
_SHORT_PREFIX = 9
# Own positions of one product. Longer splits mean fewer products, and more positions read that hold nothing yet.
_SPLIT = 64


@dataclass(frozen=True, eq=False)
class Prefix:
    """Prefilled captions.

    keys, values: (L, G, P, H, D). hidden: (G, C), the last position's output, which predicts the first image token.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor

    @property
    def num_captions(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class PrefixRef:
    """One caption of a prefix; two are equal when they name the same caption of the same object."""

    prefix: Prefix
    index: int

    @property
    def keys(self) -> Tensor:
        """(L, P, H, D); a view."""
        return self.prefix.keys[:, self.index]

    @property
    def values(self) -> Tensor:
        """(L, P, H, D); a view."""
        return self.prefix.values[:, self.index]

    @property
    def hidden(self) -> Tensor:
        """(C,); a view."""
        return self.prefix.hidden[self.index]


@dataclass(frozen=True)
class _Siblings:
    """Captions with equally many queries (after padding): their prefix parts are one batched product."""

    queries: Tensor  # (g, n) index of each sibling's query; a short group repeats its last one
    keys: list[Tensor]  # one a layer: (g * H, D, P)
    values: list[Tensor]  # one a layer: (g * H, P, D)
    first: int | None  # the first query, where all follow one another

    def multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Rows (R * w, H, x) by matrices (g * H, x, y) -> (g * n, H, y)."""
        g, n = self.queries.shape
        taken = rows[self.queries] if self.first is None else rows[self.first : self.first + g * n].unflatten(0, (g, n))
        # Always laid out anew: a product of strided rows may take another BLAS kernel (seen in bfloat16).
        chosen = taken.transpose(1, 2).contiguous().flatten(0, 1)  # (g * H, n, x)
        return torch.bmm(chosen, matrices).unflatten(0, (g, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _Reads:
    """What all layers of one pattern share in a step."""

    split: Tensor  # (R, w) where each new position goes
    place: Tensor  # (R, w)
    splits: range | list[int]  # those that are read, ascending; S of them
    mask: Tensor  # (S, R, w, 1, split), 0 or -inf
    scores: Tensor  # (S, w, R * H, 1, split), written by each layer
    results: Tensor  # (S, w, R * H, 1, D), written by each layer


@dataclass(frozen=True)
class _Step:
    """What all layers of a step share."""

    sequences: Tensor  # (R, w) whose each new position is; the spare sequence's for positions past the end
    reads: dict[AttentionPattern, _Reads]


@dataclass(frozen=True)
class _Splits:
    """The cache's splits as matrices, made once for as long as R and S stay: 80 views a layer and step otherwise."""

    num_sequences: int
    num_splits: int
    keys: list[list[Tensor]]  # layer, split: (R * H, D, split)
    values: list[list[Tensor]]  # layer, split: (R * H, split, D)

    @staticmethod
    def of(own: Tensor, num_sequences: int, num_splits: int) -> "_Splits":
        keys, values = (
            [[split[:num_sequences].flatten(0, 1) for split in layer[:num_splits]] for layer in part] for part in own
        )
        keys = [[split.transpose(1, 2) for split in layer] for layer in keys]
        return _Splits(num_sequences, num_splits, keys, values)


class KVCache:
    """Preallocated keys and values of sequences that come and go.

    Args:
        num_sequences: how many there is room for.
        num_positions: N, own positions of a sequence.
        prefix_shape: (L, P, H, D).
        window: w, positions of a sequence that are computed together.
        patterns: of each layer, over a grid of `grid_size` cells a side; none: full attention.
        shifts: for models with token shift: what their branches take from neighbouring cells.
    """

    def __init__(
        self,
        num_sequences: int,
        num_positions: int,
        prefix_shape: tuple[int, int, int, int],
        *,
        window: int = 1,
        patterns: tuple[AttentionPattern, ...] = (),
        grid_size: int = 0,
        shifts: ShiftCache | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        L, _, H, D = prefix_shape
        self._num_positions = max(num_positions, 1)
        full: AttentionPattern = "full"
        self._patterns = patterns or (full,) * L
        self.shifts = shifts
        self._splits: _Splits | None = None
        self._step: _Step | None = None
        self._wide = torch.promote_types(dtype, torch.float32)
        self._siblings: list[_Siblings] = []
        self._place_of_query: Tensor | None = None
        self._split = min(_SPLIT, _round_up(self._num_positions, 16))
        num_splits = -(-self._num_positions // self._split)
        num_rows = num_sequences + (window > 1)  # a window may reach past the end: a spare sequence takes that
        # Keys, then values. Zeros: unwritten positions are multiplied by zero, and zero times a stray nan is nan. Written
        # here and now, since torch.zeros leaves the pages to be made one by one in the steps (0.25 ms a layer).
        self._own = torch.empty(2, L, num_splits, num_rows, H, self._split, D, dtype=dtype, device=device).zero_()
        places = torch.arange(num_splits * self._split, dtype=torch.int64, device=device)
        self._places = places.view(num_splits, 1, 1, 1, self._split)
        self._pattern_places: dict[AttentionPattern, PatternPlaces] = {
            pattern: pattern_places(pattern, grid_size, self._num_positions, num_splits, self._split, device)
            for pattern in dict.fromkeys(self._patterns)
            if pattern != "full"
        }
        self._taken: Tensor | None = None
        self._rows = torch.arange(num_rows, dtype=torch.int64, device=device)
        self._offsets = torch.arange(window, dtype=torch.int64, device=device)

    @staticmethod
    def of_model(model: "_Model", num_sequences: int, *, window: int = 1) -> "KVCache":
        """A cache for all that a model computes of `num_sequences` sequences: the last token of an image is never an input."""
        config, dtype, device = model.config, model.dtype, model.device
        shifts = None
        if config.token_shift:
            shifts = ShiftCache(config, num_sequences, window=window, dtype=dtype, device=device)
        prefix_shape = (config.num_layers, config.prefix_len, config.num_heads, config.head_dim)
        return KVCache(
            num_sequences, config.image_seq_len - 1, prefix_shape, window=window, patterns=config.patterns,
            grid_size=config.image_grid_size, shifts=shifts, dtype=dtype, device=device,
        )  # fmt: skip

    def copy_sequence(self, sequence: int, source: "KVCache", source_sequence: int) -> None:
        """Takes over a sequence's own positions from a cache with as many positions a sequence."""
        self._own[:, :, :, sequence] = source._own[:, :, :, source_sequence]
        if self.shifts is not None and source.shifts is not None:
            self.shifts.copy_sequence(sequence, source.shifts, source_sequence)

    def set_window(self, window: int) -> None:
        """Computes so many positions a sequence from now on, none of which may lie past the end; `set_prefixes` comes next."""
        self._offsets = torch.arange(window, dtype=torch.int64, device=self._rows.device)

    def set_prefixes(self, prefix_of_sequence: Mapping[int, PrefixRef]) -> None:
        """Sets which sequences are read from now on, and their captions; to be called when that changes.

        The results of other sequences are undefined until then.
        """
        w = len(self._offsets)
        self._taken = torch.tensor(sorted(prefix_of_sequence), dtype=torch.int64, device=self._rows.device)
        self._siblings = _group(
            {sequence * w + offset: ref for sequence, ref in prefix_of_sequence.items() for offset in range(w)}
        )
        places: dict[int, int] = {}
        for place, query in enumerate(query for group in self._siblings for query in group.queries.flatten().tolist()):
            places.setdefault(query, place)
        highest = max(places, default=-1)
        laid_out = [places.get(query, 0) for query in range(highest + 1)]
        is_in_order = laid_out == list(range(highest + 1))
        self._place_of_query = (
            None if is_in_order else torch.tensor(laid_out, dtype=torch.int64, device=self._rows.device)
        )

    def begin_step(self, lengths: Tensor, longest: int) -> None:
        """Prepares a step of the first R sequences.

        Args:
            lengths: (R,) own positions that each holds before its window.
            longest: the largest of them.
        """
        held = lengths[:, None] + self._offsets  # (R, w) before each new position
        if self.shifts is not None:
            self.shifts.begin_step(held)
        inside = held < self._num_positions
        held = held.clamp(max=self._num_positions - 1)
        R = held.shape[0]
        S = (min(longest + len(self._offsets), self._num_positions) - 1) // self._split + 1
        built = self._own.shape[2] if self._pattern_places else S
        if self._splits is None or (self._splits.num_sequences, self._splits.num_splits) != (R, built):
            self._splits = _Splits.of(self._own, R, built)
        self._step = _Step(
            sequences=torch.where(inside, self._rows[:R, None], len(self._rows) - 1),
            reads={
                pattern: self._full_reads(held, S) if pattern == "full" else self._pattern_reads(pattern, held)
                for pattern in dict.fromkeys(self._patterns)
            },
        )

    def _full_reads(self, held: Tensor, S: int) -> _Reads:
        # A position sees what its sequence holds, those of its window before it, and itself.
        return self._reads(held, range(S), self._places[:S] > held[:, :, None, None])

    def _pattern_reads(self, pattern: AttentionPattern, held: Tensor) -> _Reads:
        known = self._pattern_places[pattern]
        # Rows of no sequence are computed too, and read whatever splits the others need.
        taken = held if self._taken is None else held[self._taken]
        splits = known.is_split_read[taken.flatten()].any(0).nonzero()[:, 0].tolist()
        is_read = known.is_read[held].unflatten(2, (-1, self._split))[:, :, splits]  # (R, w, S, split)
        return self._reads(known.place_of[held], splits, ~is_read.permute(2, 0, 1, 3)[:, :, :, None])

    def _reads(self, places: Tensor, splits: range | list[int], is_masked: Tensor) -> _Reads:
        """places (R, w); is_masked (S, R, w, 1, split)."""
        (R, w), H, D = places.shape, self._own.shape[4], self._own.shape[6]
        return _Reads(
            split=places // self._split,
            place=places % self._split,
            splits=splits,
            mask=torch.zeros_like(is_masked, dtype=self._wide).masked_fill_(is_masked, -torch.inf),
            scores=self._own.new_empty(len(splits), w, R * H, 1, self._split),
            results=self._own.new_empty(len(splits), w, R * H, 1, D),
        )

    def append_and_attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Stores the window's keys and values; each of its queries reads the prefix and what is before it.

        New positions overwrite what a wrong speculation left there.

        Args:
            qkv: (R, w, 3, H, D), of the sequences of `begin_step`; queries divided by sqrt(D).

        Returns:
            (R, w, H, D) in qkv's dtype; softmax in float32 or better.
        """
        step, splits = self._step, self._splits
        assert step is not None
        assert splits is not None
        reads = step.reads[self._patterns[layer]]
        self._own[:, layer][:, reads.split, step.sequences, :, reads.place] = qkv[:, :, 1:]
        R, w, _, H, D = qkv.shape
        q = qkv[:, :, 0].flatten(0, 1)  # (R * w, H, D)
        prefix_scores = self._per_query([group.multiply(q, group.keys[layer]) for group in self._siblings], R * w)
        prefix_scores = prefix_scores.to(self._wide)  # (R * w, H, P)
        by_offset = qkv[:, :, 0].transpose(0, 1).reshape(w, R * H, 1, D).unbind()
        for scores, keys in zip(reads.scores, (splits.keys[layer][number] for number in reads.splits), strict=True):
            for one, query in zip(scores, by_offset, strict=True):
                torch.bmm(query, keys, out=one)
        own_scores = reads.scores.view(-1, w, R, H, self._split).transpose(1, 2) + reads.mask
        own_scores = own_scores.flatten(1, 2)  # (S, R * w, H, split), float32 or better
        highest = torch.maximum(prefix_scores.amax(2), own_scores.amax(3).amax(0))[:, :, None]  # (R * w, H, 1)
        prefix_weights = (prefix_scores - highest).exp_()
        own_weights = own_scores.sub_(highest).exp_()
        total = prefix_weights.sum(2)
        for part in own_weights.sum(3):
            total = total + part  # (R * w, H)
        prefix_weights = prefix_weights.to(q.dtype)
        weights = own_weights.to(q.dtype).unflatten(1, (R, w)).transpose(1, 2).reshape(reads.scores.shape)
        result = self._per_query(
            [group.multiply(prefix_weights, group.values[layer]) for group in self._siblings], R * w
        )
        for results, split_weights, values in zip(
            reads.results, weights, (splits.values[layer][number] for number in reads.splits), strict=True
        ):
            for one, weight in zip(results, split_weights, strict=True):
                torch.bmm(weight, values, out=one)
        for part in reads.results.view(-1, w, R, H, D).transpose(1, 2).flatten(1, 2):
            result = result + part  # (R * w, H, D)
        return (result / total[:, :, None]).to(q.dtype).unflatten(0, (R, w))

    def _per_query(self, grouped: list[Tensor], num_queries: int) -> Tensor:
        """Results (g * n, H, x) of each group -> (R * w, H, x); queries without a caption repeat another's."""
        rows = grouped[0] if len(grouped) == 1 else torch.cat(grouped)
        if self._place_of_query is not None:
            rows = rows[self._place_of_query]
        missing = num_queries - rows.shape[0]
        if missing <= 0:
            return rows[:num_queries]
        return torch.cat([rows, rows[:1].expand(missing, -1, -1)])


class _Model(Protocol):
    """What `KVCache.of_model` asks of a model."""

    @property
    def config(self) -> TransformerConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def empty_prefix(L: int, G: int, P: int, H: int, D: int, C: int, *, dtype: torch.dtype, device: torch.device) -> Prefix:
    """Room for G captions, to be filled by prefill; heads before positions in memory."""
    keys = torch.empty(L, G, H, P, D, dtype=dtype, device=device).transpose(2, 3)
    return Prefix(keys, torch.empty_like(keys), torch.empty(G, C, dtype=dtype, device=device))


def _group(prefix_of_query: Mapping[int, PrefixRef]) -> list[_Siblings]:
    """Queries by caption, captions by (padded) number of queries: usually one group, two with guidance."""
    queries_of: dict[PrefixRef, list[int]] = {}
    for query, ref in sorted(prefix_of_query.items(), key=lambda item: item[0]):
        queries_of.setdefault(ref, []).append(query)
    by_size: dict[int, list[tuple[PrefixRef, list[int]]]] = {}
    for ref, queries in queries_of.items():
        at_once = _SIBLINGS_MULTIPLE if ref.keys.shape[1] < _SHORT_PREFIX else _SIBLINGS_MAX
        for start in range(0, len(queries), at_once):
            part = queries[start : start + at_once]
            size = _round_up(len(part), _SIBLINGS_MULTIPLE)
            by_size.setdefault(size, []).append((ref, part + part[-1:] * (size - len(part))))
    return [_siblings([ref for ref, _ in entries], [queries for _, queries in entries]) for entries in by_size.values()]


def _siblings(refs: list[PrefixRef], queries: list[list[int]]) -> _Siblings:
    keys = torch.stack([ref.keys.transpose(1, 2) for ref in refs], dim=1)
    values = torch.stack([ref.values.transpose(1, 2) for ref in refs], dim=1)
    in_order = [query for part in queries for query in part]
    follow_one_another = in_order == list(range(in_order[0], in_order[0] + len(in_order)))
    return _Siblings(
        queries=torch.tensor(queries, dtype=torch.int64, device=keys.device),
        keys=list(keys.flatten(1, 2).transpose(2, 3)),  # (L, g, H, P, D) -> L x (g * H, D, P)
        values=list(values.flatten(1, 2)),
        first=in_order[0] if follow_one_another else None,
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
