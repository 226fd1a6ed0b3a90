"""The decode step as one call of compiled code (kernels/cpu): no operator of torch between embedding and hidden states.

R rows computed, w window, L layers, S sequences, H heads, D head dim, P prefix positions, C model dim, V image vocabulary.

It reads float32, 8-bit or 4-bit weights once a step for all rows. A row's bits do not depend on the other rows, so nothing
is padded; nor on the number of threads, nor on the instruction set. Activations, keys and values are float32 whatever the
weights; a bfloat16 model in 8 or 4 bits is therefore computed in float32 between its integer products.

Models with options that it lacks (`lacking`) are decoded by torch's operators, as all are where the library was not built.
"""

import ctypes
import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.thread_choice import ThreadChoice
from engine.decoding.kv_cache import Prefix, PrefixRef
from engine.decoding.step_model import NO_PADDING, CompiledModel, StepCache, StepModel
from engine.device import compiled_set
from engine.models.attention import QK_EPS, QK_GAIN
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import AttentionBranch, FeedForwardBranch, Layer
from kernels import decode_step
from kernels.decode_step import ACTIVATIONS, GROUP, LANES, PackedLinear, WeightKind, pointer


def library() -> ctypes.CDLL | None:
    """The compiled step for this processor, within the limits that the environment sets; None where there is none."""
    instructions = compiled_set()
    return None if instructions is None else decode_step.load(instructions)


def lacking(config: TransformerConfig, kind: WeightKind) -> str | None:
    """What the compiled step lacks for a model: an option's name, or a size; None: nothing."""
    for option in ("reversible", "sandwich_norm", "stable", "token_shift", "rotary"):
        if getattr(config, option):
            return option
    if set(config.patterns) != {"full"}:
        return "attention_patterns"
    multiple = GROUP if kind == "int4" else LANES
    widths = {
        "dim": config.dim, "num_heads * head_dim": config.num_heads * config.head_dim,
        "ff_mult * dim": config.ff_mult * config.dim,
    }  # fmt: skip
    for name, width in widths.items():
        if width % multiple:
            return f"{name} = {width}, no multiple of {multiple}"
    for name in ("head_dim", "image_vocab_size"):
        if getattr(config, name) % LANES:
            return f"{name} = {getattr(config, name)}, no multiple of {LANES}"
    return None


def can_compile(model: KoDalle, kind: WeightKind) -> bool:
    """Whether the compiled step computes this model here; where only the library is missing, stderr says so once."""
    weight = model.head.weight
    dtypes = (torch.float32,) if kind == "float32" else (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or weight.dtype not in dtypes or lacking(model.config, kind) is not None:
        return False
    if library() is None and compiled_set() is not None:
        _report_missing()
    return library() is not None


@functools.cache
def _report_missing() -> None:
    print(
        "decoding: the compiled step was not built with this installation (no C++ compiler?): slower, by torch's operators",
        file=sys.stderr,
    )


def compiled_step_model(model: KoDalle, kind: WeightKind) -> StepModel:
    """The model as the compiled step reads it; `can_compile` has said yes. Adds a copy of the weights, of `kind`."""
    found = library()
    assert found is not None
    step = CompiledStep(model, kind, found)
    return StepModel(model, (), step.image_logits, NO_PADDING, compiled=step)


class CompiledStep(CompiledModel):
    """A model's packed weights, and the two calls of a step."""

    def __init__(self, model: KoDalle, kind: WeightKind, found: ctypes.CDLL) -> None:
        self.config, self._library, self._kind = model.config, found, kind
        self._kept: list[object] = []  # what the structures point to
        # By rows: times of as many rows compare.
        self._feed_threads: defaultdict[int, ThreadChoice] = defaultdict(ThreadChoice)
        self._predict_threads: defaultdict[int, ThreadChoice] = defaultdict(ThreadChoice)
        self._prepared: weakref.WeakKeyDictionary[Prefix, dict[int, tuple[Tensor, Tensor]]] = (
            weakref.WeakKeyDictionary()
        )
        config, layers = model.config, cast(list[Layer], list(model.layers))
        self._head = PackedLinear(found, *model.head.image_rows(), kind)
        self._layers = (decode_step.Layer * len(layers))(*(self._layer(layer) for layer in layers))
        self._model = decode_step.Model(
            dim=config.dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            inner_dim=config.ff_mult * config.dim,
            activation=ACTIVATIONS[config.activation],
            normalises_heads=config.qk_norm,
            mixes=config.x0_scalars,
            query_gain=QK_GAIN * config.head_dim**-0.5,
            head_epsilon=QK_EPS,
            layers=self._layers,
            tokens=self._keep(model.image_embedding.tokens),
            positions=self._keep(model.input_positions()),
            head_norm=self._norm(model.head.norm),
            head=self._head.struct,
        )

    def image_logits(self, normed: Tensor) -> Tensor:
        """(R, C) float32 -> (R, V)."""
        return self._head(normed)

    def make_cache(self, num_sequences: int) -> "CompiledCache":
        return CompiledCache(self, num_sequences)

    def make_batch(
        self, rows: Tensor, *, guided: Tensor, unconditional_rows: Tensor, guidance: Tensor
    ) -> "CompiledBatch":
        """See `CompiledModel.make_batch`."""
        return CompiledBatch(self, rows, guided, unconditional_rows, guidance)

    def run_feed(self, cache: "CompiledCache", feed: decode_step.Feed) -> None:
        """Computes `feed`, on all of torch's threads or on one: see `ThreadChoice`."""

        def run(num_threads: int) -> None:
            self._library.kodalle_feed(
                ctypes.byref(self._model), ctypes.byref(cache.struct), ctypes.byref(cache.prefixes), ctypes.byref(feed),
                num_threads,
            )  # fmt: skip

        self._feed_threads[feed.num_rows].run(run, torch.get_num_threads())

    def run_predict(self, predict: decode_step.Predict) -> None:
        """Computes `predict`, alike."""

        def run(num_threads: int) -> None:
            self._library.kodalle_predict(ctypes.byref(self._model), ctypes.byref(predict), num_threads)

        self._predict_threads[predict.num_rows].run(run, torch.get_num_threads())

    def prepared(self, ref: PrefixRef) -> tuple[Tensor, Tensor]:
        """A caption's keys (L, H, P / 16 rounded up, D, 16) and values (L, H, P, D) as the library reads them."""
        of_prefix = self._prepared.setdefault(ref.prefix, {})
        if ref.index not in of_prefix:
            keys, values = (part.transpose(1, 2).float() for part in (ref.keys, ref.values))  # (L, H, P, D)
            keys = F.pad(keys, (0, 0, 0, -keys.shape[2] % LANES))
            keys = keys.unflatten(2, (-1, LANES)).transpose(3, 4).contiguous()
            of_prefix[ref.index] = keys, values if values[0].is_contiguous() else values.contiguous()
        return of_prefix[ref.index]

    def _layer(self, layer: Layer) -> decode_step.Layer:
        attention: AttentionBranch = layer.attention
        feed_forward: FeedForwardBranch = layer.feed_forward
        keep, add = (1.0, 0.0) if layer.x0_scalars is None else layer.x0_scalars.tolist()
        # Queries are divided by sqrt(D) in the weights, or where heads are normalised afterwards.
        scales = (1.0 if attention.qk_norm else attention.head_dim**-0.5, 1.0, 1.0)

        def scaled(part: Tensor) -> Tensor:
            return torch.cat([rows.float() * scale for rows, scale in zip(part.chunk(3), scales, strict=True)])

        qkv, bias = attention.qkv.weight, attention.qkv.bias
        return decode_step.Layer(
            attention_norm=self._norm(attention.norm),
            qkv=self._linear(scaled(qkv), None if bias is None else scaled(bias)),
            # Small, and in float32 whatever the weights: see packed_weights.py.
            out=self._linear(*_folded(attention.out, attention.scale), kind="float32"),
            feed_forward_norm=self._norm(feed_forward.norm),
            grow=self._linear(feed_forward.grow.weight, feed_forward.grow.bias),
            shrink=self._linear(*_folded(feed_forward.shrink, feed_forward.scale)),
            keep=keep,
            add=add,
        )

    def _linear(self, weight: Tensor, bias: Tensor | None, *, kind: WeightKind | None = None) -> decode_step.Linear:
        packed = PackedLinear(self._library, weight, bias, kind or self._kind)
        self._kept.append(packed)
        return packed.struct

    def _norm(self, norm: nn.LayerNorm) -> decode_step.LayerNorm:
        return decode_step.LayerNorm(self._keep(norm.weight), self._keep(norm.bias), norm.eps)

    def _keep(self, tensor: Tensor) -> int | None:
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return pointer(kept)


class CompiledBatch:
    """The sequences of a batch as arguments of the compiled step, which lie where they are from step to step.

    A step of a small model takes less time than torch's operators would to make them.

    B sequences, U of them guided, w window.
    """

    def __init__(
        self, step: CompiledStep, rows: Tensor, guided: Tensor, unconditional_rows: Tensor, guidance: Tensor
    ) -> None:
        self._step, self._rows, self._guided = step, rows, guided
        self._unconditional_rows, self._guidance = unconditional_rows, guidance
        self._fed_rows = torch.cat([rows, unconditional_rows])
        self._feeds: dict[tuple[int, int], _Feed] = {}
        self._predicts: dict[int, _Predict] = {}

    def feed(self, cache: StepCache, tokens: Tensor, positions: Tensor, *, longest: int, num_rows: int) -> Tensor:
        """See `CompiledRows.feed`."""
        assert isinstance(cache, CompiledCache)
        w, B = tokens.shape[1], len(self._rows)
        kept = self._feeds.get((w, num_rows))
        if kept is None:
            kept = self._feeds[w, num_rows] = _Feed(self._fed_rows, w, num_rows, self._step.config.dim)
        kept.tokens[:B], kept.lengths[:B] = tokens, positions
        if len(self._guided):
            kept.tokens[B:], kept.lengths[B:] = tokens[self._guided], positions[self._guided]
        torch.add(kept.lengths[:, None], kept.offsets, out=kept.positions)
        if longest + w > cache.num_positions:
            self._step.run_feed(cache, kept.inside(cache.num_positions))
        else:
            self._step.run_feed(cache, kept.struct)
        return kept.hidden

    def predict(self, hidden: Tensor) -> Tensor:
        """See `CompiledRows.predict`."""
        w, hidden = hidden.shape[1], hidden.contiguous()
        kept = self._predicts.get(w)
        if kept is None:
            kept = self._predicts[w] = _Predict(self._rows, self._guided, self._unconditional_rows, self._guidance, w)
        shape = (*kept.rows.shape, self._step.config.image_vocab_size)
        logits = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        kept.struct.hidden, kept.struct.logits = hidden.data_ptr(), logits.data_ptr()
        self._step.run_predict(kept.struct)
        return logits


class _Feed:
    """A pass of w tokens of n rows: its arguments, and the memory that they point to.

    tokens, positions: (n, w). lengths: (n,), positions before them. hidden: (num_rows, w, C), zeros in rows that are not fed.
    """

    def __init__(self, rows: Tensor, w: int, num_rows: int, dim: int) -> None:
        n, device = len(rows), rows.device
        self.offsets = torch.arange(w, dtype=torch.int64, device=device)
        self.tokens, self.positions = (torch.zeros(n, w, dtype=torch.int64, device=device) for _ in range(2))
        self.lengths = torch.zeros(n, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(num_rows, w, dim, dtype=torch.float32, device=device)
        self._sequences = rows[:, None].expand(n, w).contiguous()
        self._places = rows[:, None] * w + self.offsets
        self.struct = self._struct(self.tokens, self._sequences, self.positions, self._places)

    def inside(self, num_positions: int) -> decode_step.Feed:
        """Those of the positions that there are, the others' results zeros."""
        kept = self.positions < num_positions
        parts = [part[kept] for part in (self.tokens, self._sequences, self.positions, self._places)]
        self._inside = parts  # lives as long as what points to it
        self.hidden.zero_()
        return self._struct(*parts)

    def _struct(self, tokens: Tensor, sequences: Tensor, positions: Tensor, places: Tensor) -> decode_step.Feed:
        columns = (tokens, sequences, positions, places, self.hidden)
        return decode_step.Feed(tokens.numel(), *(column.data_ptr() for column in columns))


class _Predict:
    """Logits of w positions of each sequence: its arguments but for `hidden` and `logits`, and their memory. rows: (B, w)."""

    def __init__(self, rows: Tensor, guided: Tensor, unconditional_rows: Tensor, guidance: Tensor, w: int) -> None:
        offsets = torch.arange(w, dtype=torch.int64, device=rows.device)
        self.rows = rows[:, None] * w + offsets
        self._unconditional = torch.full_like(self.rows, -1)
        self._guidance = torch.ones(self.rows.shape, dtype=torch.float32, device=rows.device)
        self._unconditional[guided] = unconditional_rows[:, None] * w + offsets
        self._guidance[guided] = guidance[:, :, 0].float()
        self.struct = decode_step.Predict(
            num_rows=self.rows.numel(),
            rows=self.rows.data_ptr(),
            unconditional=self._unconditional.data_ptr(),
            guidance=self._guidance.data_ptr(),
        )


class CompiledCache:
    """Keys and values of sequences that come and go, float32, in the library's layout; used as `KVCache` is.

    keys: (L, S, H, blocks of 16 positions, D, 16). values: (L, S, H, blocks * 16, D).
    """

    def __init__(self, step: CompiledStep, num_sequences: int) -> None:
        config, self._step = step.config, step
        self.num_positions = max(config.image_seq_len - 1, 1)  # the last token is never an input
        blocks = -(-self.num_positions // LANES)
        shape = (config.num_layers, num_sequences, config.num_heads, blocks)
        self._keys = torch.zeros(*shape, config.head_dim, LANES, dtype=torch.float32, device="cpu")
        self._values = torch.zeros(*shape, LANES, config.head_dim, dtype=torch.float32, device="cpu")
        self.struct = decode_step.Cache(
            num_sequences, blocks, config.prefix_len, self._keys.data_ptr(), self._values.data_ptr()
        )
        self._pointers = torch.zeros(3, num_sequences, dtype=torch.int64, device="cpu")
        self.prefixes = decode_step.Prefixes(*(part.data_ptr() for part in self._pointers))
        self._read: list[tuple[Tensor, Tensor]] = []

    def set_window(self, window: int) -> None:
        """Nothing depends on it."""

    def set_prefixes(self, prefix_of_sequence: Mapping[int, PrefixRef]) -> None:
        """Sets which sequences are read from now on, and their captions."""
        prepared = {sequence: self._step.prepared(ref) for sequence, ref in prefix_of_sequence.items()}
        self._read = list(prepared.values())
        for sequence, (keys, values) in prepared.items():
            self._pointers[0, sequence], self._pointers[1, sequence] = keys.data_ptr(), values.data_ptr()
            self._pointers[2, sequence] = values.stride(0)

    def copy_sequence(self, sequence: int, source: StepCache, source_sequence: int) -> None:
        """Takes over a sequence's own positions from a cache of the same model."""
        assert isinstance(source, CompiledCache)
        self._keys[:, sequence] = source._keys[:, source_sequence]
        self._values[:, sequence] = source._values[:, source_sequence]


def _folded(linear: nn.Linear, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of scale * linear(x), float32."""
    return linear.weight.float() * scale.float()[:, None], linear.bias.float() * scale.float()
