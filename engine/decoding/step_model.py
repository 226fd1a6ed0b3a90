"""What a decode step needs of the model, apart from attention over the cache: four functions of matrix rows.

R rows, C model dim, H heads, D head dim, V image vocabulary, N image tokens.

    embed ─► to_streams ─► [ mix ─► project ─► attention over the cache ─► finish ] x layers ─► from_streams ─► hidden ─► norm ─► image_logits

`to_streams` and `from_streams` are the model's: a reversible one has two streams between them, x (R, 2 C).
`mix` changes nothing but in models with x0 scalars, whose layers read the first one's input as well.
The plain step model calls the model's own modules. engine/decoding/cpu/packed_weights.py makes others, for processors.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.decoding.kv_cache import KVCache, PrefixRef
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer, Shift
from engine.models.whole_sequence import turns_of_cells


class StepLayer(Protocol):
    """One layer, in two halves. Its positions are turned between them, where the model has rotary ones.

    `shift` is token shift: normalised inputs (R, C) -> (R, C), see engine/decoding/shift_cache.py.
    """

    def project(self, x: Tensor, shift: Shift | None = None) -> Tensor:
        """(R, C) -> queries / sqrt(D), keys, values (R, 3, H, D)."""

    def finish(self, x: Tensor, attended: Tensor, shift: Shift | None = None) -> Tensor:
        """x (R, C) and the attention's result (R, H, D) -> the next layer's x (R, C)."""


class PaddingRule(NamedTuple):
    """How many rows to compute together, so that a row's bits do not depend on how many are needed."""

    multiple: int
    minimum: int
    tile: int | None  # rows at a time; None: all

    def padded(self, num_rows: int) -> int:
        """Rows to compute where `num_rows` are needed."""
        full, rest = divmod(num_rows, self.tile) if self.tile else (0, num_rows)
        rest = max(self.minimum, -(-rest // self.multiple) * self.multiple) if rest else 0
        return full * (self.tile or 0) + rest

    def fill(self, rows: Tensor) -> Tensor:
        """(n, ...) -> (padded(n), ...), the first row repeated."""
        missing = self.padded(len(rows)) - len(rows)
        return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows

    def tiled(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function` over at most `tile` rows at a time."""
        if self.tile is None or tensors[0].shape[0] <= self.tile:
            return function(*tensors)
        tiles = zip(*(tensor.split(self.tile) for tensor in tensors), strict=True)
        return torch.cat([function(*tile) for tile in tiles])


NO_PADDING = PaddingRule(multiple=1, minimum=1, tile=None)


class StepCache(Protocol):
    """A KV cache as decoders use it: engine/decoding/kv_cache.py, or a compiled step's own."""

    def set_window(self, window: int) -> None: ...
    def set_prefixes(self, prefix_of_sequence: Mapping[int, PrefixRef]) -> None: ...
    def copy_sequence(self, sequence: int, source: Any, source_sequence: int) -> None: ...


class CompiledModel(Protocol):
    """A step that is compiled as a whole, see engine/decoding/cpu/compiled_step.py."""

    def make_cache(self, num_sequences: int) -> StepCache:
        """Room for the keys and values of so many sequences."""

    def make_batch(
        self, rows: Tensor, *, guided: Tensor, unconditional_rows: Tensor, guidance: Tensor
    ) -> "CompiledRows":
        """A batch of sequences in rows (B,) of the cache; for the others see `BatchMetadata`."""


class CompiledRows(Protocol):
    """A batch that a compiled step computes, again and again."""

    def feed(self, cache: StepCache, tokens: Tensor, positions: Tensor, *, longest: int, num_rows: int) -> Tensor:
        """Feeds tokens through the layers, to the unconditional sequences as well.

        Args:
            tokens: (B, w) int64.
            positions: (B,) int64, own positions before them. What lies past the cache's end is not computed.
            longest: the largest of `positions`, or more.
            num_rows: R, more than the highest row.

        Returns:
            (R, w, C), the last layer's output by row of the cache; of other rows zeros. The next call overwrites it.
        """

    def predict(self, hidden: Tensor) -> Tensor:
        """What comes next after each position, guidance applied: hidden (R, w, C) -> (B, w, V)."""


class StepModel:
    """A model as a decode step uses it; its weights must not change while it lives.

    Args:
        model: has the embeddings and the norm before the head.
        layers: first to last.
        image_logits: (R, C), normed -> (R, V).
        padding_rule: what its arithmetic needs to be batch-invariant.
        compiled: computes whole steps instead of `layers`, which are none then.
    """

    def __init__(
        self,
        model: KoDalle,
        layers: Sequence[StepLayer],
        image_logits: Callable[[Tensor], Tensor],
        padding_rule: PaddingRule,
        *,
        compiled: CompiledModel | None = None,
    ) -> None:
        self.config: TransformerConfig = model.config
        self.compiled = compiled
        self.dtype = model.head.weight.dtype if compiled is None else torch.float32
        self.device = model.head.weight.device
        self.layers, self.image_logits, self.padding_rule = tuple(layers), image_logits, padding_rule
        self.head_norm: Callable[[Tensor], Tensor] = model.head.norm
        self._tokens = model.image_embedding.tokens
        self._positions = model.input_positions().detach()  # (N, C)
        self.turns = turns_of_cells(self.config, self.dtype, self.device)  # (2, N, rotated channels); None: not rotary
        self.to_streams, self.from_streams = model.to_streams, model.from_streams
        self._mixes = [layer.mix for layer in cast(list[Layer], list(model.layers))]

    def make_cache(self, num_sequences: int, *, window: int = 1) -> StepCache:
        """A cache for all that the model computes of `num_sequences` sequences, `window` positions together."""
        if self.compiled is not None:
            return self.compiled.make_cache(num_sequences)
        return KVCache.of_model(self, num_sequences, window=window)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Image tokens (R,) at grid cells (R,) -> (R, C)."""
        return self._tokens[tokens] + self._positions[positions]

    def mix(self, number: int, x: Tensor, start: Tensor) -> Tensor:
        """What layer `number` (from 0) takes for x (R, C): see `Layer.mix`; start (R, C) is the first layer's input."""
        return self._mixes[number](x, start)

    def without_padding(self) -> "StepModel":
        """The same weights, computing only the rows that are needed: not batch-invariant."""
        unpadded = copy.copy(self)
        unpadded.padding_rule = NO_PADDING
        return unpadded


def as_step_model(model: KoDalle | StepModel, *, batch_invariant: bool) -> StepModel:
    """A step model as a decoder uses it; a model's own modules where it is none yet."""
    step_model = plain_step_model(model) if isinstance(model, KoDalle) else model
    return step_model if batch_invariant else step_model.without_padding()


def plain_step_model(model: KoDalle) -> StepModel:
    """The model's own modules, weights as they are.

    Measured with MKL 2024.2 and oneDNN 3.12 (AVX-512, 1 and 2 threads, K 64 to 4096): a row of a linear layer has the
    same bits for every number of rows from 16 to 128 that is a multiple of 4 (bfloat16: from 4); below that, at odd
    numbers (bfloat16) and above 128 (float32, two threads) it has others.
    """
    minimum = 4 if model.head.weight.dtype == torch.bfloat16 else 16
    layers = [_PlainLayer(layer) for layer in cast(list[Layer], list(model.layers))]
    return StepModel(model, layers, model.head.image_logits, PaddingRule(multiple=4, minimum=minimum, tile=64))


class _PlainLayer:
    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def project(self, x: Tensor, shift: Shift | None = None) -> Tensor:
        branch = self._layer.attention
        normed = branch.norm(self._layer.streams(x)[1])
        q, k, v = branch.heads((normed if shift is None else shift(normed))[:, None])  # (R, 1, H, D) each
        return torch.cat([q * branch.head_dim**-0.5, k, v], dim=1)

    def finish(self, x: Tensor, attended: Tensor, shift: Shift | None = None) -> Tensor:
        of_rows: Shift | None = None if shift is None else lambda normed: shift(normed[:, 0])[:, None]
        return self._layer.finish(x[:, None], attended[:, None], of_rows)[:, 0]
