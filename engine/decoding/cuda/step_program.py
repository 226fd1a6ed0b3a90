"""One step of decoding on a GPU, as a fixed program over buffers that never move.

S slots, R rows computed (the first R slots), C model dim, N image tokens, V image vocabulary, L layers, H heads,
D head dim, P prefix positions, F feed-forward inner dim.

    hidden (R, C)                                                     launches
      guided_norm      head's LayerNorm, guidance mixed in             1
      head_sample      head product and draw, logits never stored      2
      (linear, sample  where some row filters: its logits, its draw    4)
      feed_tokens      given tokens, record, embedding, position       1
      of each layer:
        linear         LayerNorm + qkv                                 1
        attend         append key and value, attention                 1
        linear         out + LayerScale + residual                     1
        linear         LayerNorm + grow + GEGLU                        1
        linear         shrink + LayerScale + residual                  1
    hidden (R, C)      copied to where the next step starts            1

85 launches at 16 layers, 89 with filters. Everything that differs between steps or rows is read from the device, so the
program can be captured once for each R. Every op is a kernel of kernels/ whose rows do not depend on how many there are; library
matrix products, which promise no such thing, are not used.

Where some row filters, the others are still drawn by the fused head: a neighbour's top-k would otherwise decide
whether a row's logits are rounded to 16 bits. It costs a second read of the head, 7 % of a step's weights.
"""

from typing import cast

import torch
from torch import Tensor, nn

from engine.decoding.cuda.attention_choice import LayerCache, decode_attention_by, fastest_attention
from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.cuda.sequence_table import SequenceTable
from engine.models.transformer import KoDalle, Layer
from kernels.feed_tokens import feed_tokens
from kernels.guided_norm import guided_norm
from kernels.linear import linear, num_counters
from kernels.reference import Norm, Residual
from kernels.sampling import head_sample, sample


class StepProgram:
    """The buffers of all slots, and the step over the first R of them.

    hidden: (S, C), the last layer's output, which the next draw starts from; a row that joins brings its caption's.
    tokens: (S, N + 1), what was drawn; column N takes what finished rows compute.
    given: (S, N), -1 where to draw.

    Args:
        model: its weights must neither change nor move while the program lives.
        table, pool: what rows read; see there.
        attention: a name of engine/decoding/cuda/attention_choice.py, or "auto".
    """

    def __init__(
        self, model: KoDalle, num_slots: int, table: SequenceTable, pool: PrefixPool, *, attention: str
    ) -> None:
        config, weight = model.config, model.head.weight
        L, H, D, N = config.num_layers, config.num_heads, config.head_dim, config.image_seq_len
        dtype, device = weight.dtype, weight.device
        self._model, self._table, self._pool = model, table, pool
        self._layers = cast(list[Layer], list(model.layers))
        self._position_table = model.image_embedding.position_table()  # (N, C)
        self.hidden = torch.zeros(num_slots, config.dim, dtype=dtype, device=device)
        self.tokens = torch.zeros(num_slots, N + 1, dtype=torch.int64, device=device)
        self.given = torch.full((num_slots, N), -1, dtype=torch.int64, device=device)
        # Zeros: other attentions than ours multiply what nobody wrote by zero. Heads before positions in memory.
        own = torch.zeros(2, L, num_slots, H, max(N - 1, 1), D, dtype=dtype, device=device)
        self._keys, self._values = own.transpose(3, 4).unbind()  # (L, S, N - 1, H, D)
        # One for all: the program's launches follow each other.
        self._counters = torch.zeros(_most_counters(model, num_slots), dtype=torch.int32, device=device)
        if attention == "auto":
            attention = fastest_attention([self._cache(layer, num_slots) for layer in range(L)], dtype, device)
        self.attention = attention
        self._attend = decode_attention_by(attention, device)

    def run(self, R: int, *, filters: bool) -> None:
        """Every row's next token, and the layers over it. `filters`: some row's top-k or top-p removes something."""
        self._feed(R, *self.draw(R, filters=filters))

    def draw(self, R: int, *, filters: bool) -> tuple[Tensor, Tensor]:
        """Every row's next token, recorded.

        Returns:
            (R, C) and (R,): the layers' input, and how many tokens they read before it.
        """
        model, table = self._model, self._table
        norm, (weight, bias) = model.head.norm, model.head.image_rows()
        seeds, candidates, positions = table.seeds[:R], table.candidates[:R], table.positions[:R]
        temperature = table.temperature[:R]
        normed = guided_norm(self.hidden, table.partner[:R], table.guidance[:R], norm.weight, norm.bias, eps=norm.eps)
        drawn = head_sample(normed, weight, bias, seeds, candidates, positions, temperature)  # (R,)
        if filters:
            logits = linear(normed, weight, bias, counters=self._counters)  # (R, V)
            filtered = sample(logits, seeds, candidates, positions, temperature, table.top_k[:R], table.top_p[:R])
            drawn = torch.where(table.filters[:R] > 0, filtered, drawn)
        embedding = model.image_embedding.tokens
        return feed_tokens(drawn, table.source[:R], self.given, self.tokens, positions, embedding, self._position_table)

    def _feed(self, R: int, x: Tensor, num_read: Tensor) -> None:
        """x (R, C) through the layers, to `hidden`."""
        config, captions, counters = self._model.config, self._table.captions[:R], self._counters
        for number, layer in enumerate(self._layers):
            norm, qkv, out = layer.attention.norm, layer.attention.qkv, layer.attention.out
            projected = linear(x, qkv.weight, norm=_norm(norm), counters=counters)  # (R, 3 H D)
            q, k, v = projected.view(R, 3, config.num_heads, config.head_dim).unbind(1)  # (R, H, D) each
            attended = self._attend(q, self._cache(number, R), captions, num_read, k, v).flatten(1)  # (R, H D)
            residual = Residual(x, layer.attention.scale)
            x = linear(attended, out.weight, out.bias, residual=residual, counters=counters)
            norm, grow, shrink = layer.feed_forward.norm, layer.feed_forward.grow, layer.feed_forward.shrink
            inner = linear(x, grow.weight, grow.bias, norm=_norm(norm), gated=True, counters=counters)  # (R, F)
            residual = Residual(x, layer.feed_forward.scale)
            x = linear(inner, shrink.weight, shrink.bias, residual=residual, counters=counters)
        self.hidden[:R] = x

    def _cache(self, layer: int, R: int) -> LayerCache:
        return LayerCache(
            self._pool.keys(layer), self._pool.values(layer), self._keys[layer, :R], self._values[layer, :R]
        )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _most_counters(model: KoDalle, num_slots: int) -> int:
    """Counters that the largest of a step's products needs, for any number of rows."""
    layer = cast(Layer, model.layers[0])
    branches = (layer.attention.qkv, layer.attention.out, layer.feed_forward.grow, layer.feed_forward.shrink)
    weights = [*(linear.weight for linear in branches), model.head.image_rows()[0]]
    return max(num_counters(R, *weight.shape) for weight in weights for R in range(1, num_slots + 1))
