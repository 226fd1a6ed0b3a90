"""One step of decoding on a GPU, as a fixed program over buffers that never move.

S slots, R slots computed (the first R), C model dim, N image tokens, V image vocabulary, L layers, H heads, D head dim,
P prefix positions, F feed-forward inner dim.

    hidden (R, C)                                                     launches
      guided_norm      head's LayerNorm, guidance mixed in             1
      head_sample      head product and sampling, logits never stored  2
      (linear, sample  where some sequence filters: logits, sampling   4)
      feed_tokens      init tokens, record, embedding, position        1
      of each layer:
        linear         LayerNorm + qkv                                 1
        attend         append key and value, attention                 1
        linear         out + LayerScale + residual                     1
        linear         LayerNorm + grow + GEGLU                        1
        linear         shrink + LayerScale + residual                  1
    hidden (R, C)      copied to where the next step starts            1

85 launches at 16 layers, 89 with filters. Models with qk_norm, x0_scalars or without a gate have a few of PyTorch's own elementwise
launches a layer more. Everything that differs between steps or sequences is read from the device, so the program can
be captured once for each R. Every product is a kernel of kernels/ whose rows do not depend on how many there are;
library matrix products, which promise no such thing, are not used.

Where some sequence filters, the others are still sampled by the fused head: another sequence's top-k would otherwise
decide whether one's logits are rounded to 16 bits. It costs a second read of the head, 7 % of a step's weights.
"""

from typing import cast

import torch
from torch import Tensor, nn

from engine.decoding.cuda.attention_choice import LayerCache, decode_attention_by, fastest_attention
from engine.decoding.cuda.prefix_pool import PrefixPool
from engine.decoding.cuda.sequence_table import SequenceTable
from engine.decoding.slot_table import SlotTable
from engine.models.attention import normalised_heads
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import AttentionBranch, FeedForwardBranch, Layer
from kernels.feed_tokens import feed_tokens
from kernels.guided_norm import guided_norm
from kernels.linear import linear, num_counters
from kernels.reference import Norm, Residual
from kernels.sampling import head_sample, sample


class StepProgram:
    """The buffers of all slots, and the step over the first R of them.

    hidden: (S, C), the last layer's output, which the next token is sampled from; of a new sequence, its caption's.

    Args:
        model: its weights must neither change nor move while the program lives.
        slots: its tokens and init tokens are read and written; the host's part of it is not.
        table, pool: what sequences read; see there.
        attention: a name of engine/decoding/cuda/attention_choice.py, or "auto".
    """

    def __init__(
        self, model: KoDalle, slots: SlotTable, table: SequenceTable, pool: PrefixPool, *, attention: str
    ) -> None:
        config, weight, S = model.config, model.head.weight, slots.num_slots
        L, H, D, N = config.num_layers, config.num_heads, config.head_dim, config.image_seq_len
        dtype, device = weight.dtype, weight.device
        self._model, self._slots, self._table, self._pool = model, slots, table, pool
        self._layers = cast(list[Layer], list(model.layers))
        self._position_table = model.input_positions()  # (N, C)
        self.hidden = torch.zeros(S, config.dim, dtype=dtype, device=device)
        # Zeros: attentions other than ours multiply unwritten positions by zero. Heads before positions in memory.
        own = torch.zeros(2, L, S, H, max(N - 1, 1), D, dtype=dtype, device=device)
        self._keys, self._values = own.transpose(3, 4).unbind()  # (L, S, N - 1, H, D)
        # One for all: the program's launches follow each other.
        self._counters = torch.zeros(_most_counters(model, S), dtype=torch.int32, device=device)
        if attention == "auto":
            attention = fastest_attention([self._cache(layer, S) for layer in range(L)], dtype, device)
        self.attention = attention
        self._attend = decode_attention_by(attention, device)

    def run(self, R: int, *, filters: bool) -> None:
        """Every sequence's next token, and the layers over it. `filters`: some top-k or top-p removes something."""
        self._feed(R, *self.sample(R, filters=filters))

    def sample(self, R: int, *, filters: bool) -> tuple[Tensor, Tensor]:
        """Every sequence's next token, recorded.

        Returns:
            (R, C) and (R,): the layers' input, and how many tokens they read before it.
        """
        model, table = self._model, self._table
        norm, (weight, bias) = model.head.norm, model.head.image_rows()
        seeds, candidates, positions = table.seeds[:R], table.candidates[:R], table.positions[:R]
        temperature, unconditional = table.temperature[:R], table.unconditional[:R]
        normed = guided_norm(self.hidden, unconditional, table.guidance[:R], norm.weight, norm.bias, eps=norm.eps)
        sampled = head_sample(normed, weight, bias, seeds, candidates, positions, temperature)  # (R,)
        if filters:
            logits = linear(normed, weight, bias, counters=self._counters)  # (R, V)
            filtered = sample(logits, seeds, candidates, positions, temperature, table.top_k[:R], table.top_p[:R])
            sampled = torch.where(table.filters[:R] > 0, filtered, sampled)
        return feed_tokens(
            sampled, table.source[:R], self._slots.init_tokens, self._slots.tokens, positions,
            model.image_embedding.tokens, self._position_table,
        )  # fmt: skip

    def _feed(self, R: int, x: Tensor, num_read: Tensor) -> None:
        """x (R, C) through the layers, to `hidden`."""
        config, prefixes, counters = self._model.config, self._table.prefixes[:R], self._counters
        start = x
        x = self._model.to_streams(x)
        for number, layer in enumerate(self._layers):
            first, second = (stream.contiguous() for stream in layer.streams(layer.mix(x, start)))
            norm, qkv, out = layer.attention.norm, layer.attention.qkv, layer.attention.out
            projected = linear(second, qkv.weight, qkv.bias, norm=_norm(norm), counters=counters)  # (R, 3 H D)
            q, k, v = projected.view(R, 3, config.num_heads, config.head_dim).unbind(1)  # (R, H, D) each
            if config.qk_norm:
                q, k = normalised_heads(q, k)
            attended = self._attend(q, self._cache(number, R), prefixes, num_read, k, v).flatten(1)  # (R, H D)
            first = self._added(first, attended, out, layer.attention)
            branch = layer.feed_forward
            norm, grow, gated = branch.norm, branch.grow, branch.is_gated
            inner = linear(first, grow.weight, grow.bias, norm=_norm(norm), gated=gated, counters=counters)  # (R, F)
            inner = inner if gated else branch.activate(inner)
            x = self._added(second if config.reversible else first, inner, branch.shrink, branch)
            x = torch.cat([first, x], dim=1) if config.reversible else x
        self.hidden[:R] = self._model.from_streams(x)

    def _added(
        self, onto: Tensor, inner: Tensor, last: nn.Linear, branch: AttentionBranch | FeedForwardBranch
    ) -> Tensor:
        """onto (R, C) plus the branch that ends in `last`, of inner (R, K)."""
        if branch.norm_out is None:
            residual = Residual(onto, branch.scale)
            return linear(inner, last.weight, last.bias, residual=residual, counters=self._counters)
        out = linear(inner, last.weight, last.bias, counters=self._counters)
        return onto + branch.scale * branch.norm_out(out)

    def _cache(self, layer: int, R: int) -> LayerCache:
        return LayerCache(
            self._pool.keys(layer), self._pool.values(layer), self._keys[layer, :R], self._values[layer, :R]
        )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _most_counters(model: KoDalle, num_slots: int) -> int:
    """Counters that the largest of a step's products needs, for any number of slots."""
    layer = cast(Layer, model.layers[0])
    branches = (layer.attention.qkv, layer.attention.out, layer.feed_forward.grow, layer.feed_forward.shrink)
    weights = [*(linear.weight for linear in branches), model.head.image_rows()[0]]
    return max(num_counters(R, *weight.shape) for weight in weights for R in range(1, num_slots + 1))
