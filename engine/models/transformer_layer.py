"""Layer of the transformer: an attention branch and a feed-forward branch with learned scales.

B sequences, T positions, H heads, D head dim, C model dim, F feed-forward inner dim.

Each module uses only its own parameters in its own forward: DeepSpeed ZeRO-3 gathers them by module.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.transformer import TransformerConfig
from engine.models.attention import AttentionBackend, attention, masked_attention, normalised_heads
from engine.models.whole_sequence import pattern_mask, rotated, shift_tokens
from kernels.reference import geglu

# Token shift of a branch's normalised inputs, by whoever keeps those of other positions: (..., C) -> (..., C)
Shift = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """x += attention branch; x += feed-forward branch. With x0 scalars, x is first mixed with the first layer's input.

    Reversible: x is two streams side by side, (..., 2 C); first += attention branch of the second, second += feed-forward branch
    of the first (Gomez et al. 2017, arXiv 1707.04585, as DALLE-pytorch).
    """

    def __init__(self, config: TransformerConfig, number: int, attention_backend: AttentionBackend) -> None:
        super().__init__()
        self.reversible = config.reversible
        self.attention = AttentionBranch(config, number, attention_backend)
        self.feed_forward = FeedForwardBranch(config, number)
        start = torch.tensor([1.0, 0.0], dtype=torch.float32) if config.x0_scalars else None
        self.x0_scalars = None if start is None else nn.Parameter(start)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """x (B, T, C), two streams (B, T, 2 C), and the first layer's input (B, T, C) -> as x."""
        x = self.mix(x, start)
        first, second = self.streams(x)
        first = self.attention(second, first)
        return self._joined(first, self.feed_forward(first, self._onto(first, second)))

    def mix(self, x: Tensor, start: Tensor) -> Tensor:
        """r * x + s * start, of any equal shapes; x where the model has no such scalars."""
        if self.x0_scalars is None:
            return x
        keep, add = self.x0_scalars.unbind()
        return keep * x + add * start

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention is added to, and what it reads: the two streams, or the only one twice."""
        if not self.reversible:
            return x, x
        first, second = x.chunk(2, dim=-1)
        return first, second

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionBranch.project`."""
        return self.attention.project(self.streams(x)[1])

    def finish(self, x: Tensor, attended: Tensor, shift: Shift | None = None) -> Tensor:
        """x and the attention's result (B, T, H, D) -> the next layer's x; `shift`: see `FeedForwardBranch.forward`."""
        first, second = self.streams(x)
        first = self.attention.add(first, attended)
        return self._joined(first, self.feed_forward(first, self._onto(first, second), shift))

    def _onto(self, first: Tensor, second: Tensor) -> Tensor:
        """What the feed-forward branch is added to."""
        return second if self.reversible else first

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], dim=-1) if self.reversible else second


class AttentionBranch(nn.Module):
    """onto + scale * out(attention(qkv(norm(x)))).

    `project` and `add` are its two halves; decoding runs attention over the KV cache between them.
    """

    def __init__(self, config: TransformerConfig, number: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.backend = config.num_heads, config.head_dim, backend
        self.qk_norm = config.qk_norm
        inner = config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=config.qkv_bias, dtype=torch.float32)
        self.out = nn.Linear(inner, config.dim, dtype=torch.float32)
        self.dropout = nn.Dropout(config.attention_dropout)  # on the projected output only, as DALLE-pytorch
        self.norm_out = nn.LayerNorm(config.dim, dtype=torch.float32) if config.sandwich_norm else None
        self.scale: Tensor
        _add_scale(self, config, number, self.out)
        self.config = config
        self.pattern = config.patterns[number - 1]

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        """x (B, T, C) from <bos> on, onto (B, T, C) -> (B, T, C)."""
        q, k, v = self.project(x)
        if self.pattern == "full":
            return self.add(onto, attention(q, k, v, causal=True, backend=self.backend))
        mask = pattern_mask(self.pattern, self.config.prefix_len, self.config.image_grid_size, x.device)
        return self.add(onto, masked_attention(q, k, v, mask[: x.shape[1], : x.shape[1]], backend=self.backend))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> q, k, v, each (B, T, H, D), for an attention that divides by sqrt(D).

        With token shift and rotary positions x is of a whole sequence, from <bos> on.
        """
        normed = self.norm(x)
        if self.config.token_shift:
            normed = shift_tokens(normed, self.config)
        q, k, v = self.heads(normed)
        if self.config.rotary:
            q, k, v = (rotated(part, self.config) for part in (q, k, v))
        return q, k, v

    def heads(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, shifted inputs (B, T, C) -> q, k, v, each (B, T, H, D), before rotary positions turn them."""
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return (*normalised_heads(q, k), v) if self.qk_norm else (q, k, v)

    def add(self, onto: Tensor, attended: Tensor) -> Tensor:
        """onto (B, T, C) plus the projected, scaled attention output (B, T, H, D)."""
        branch = self.dropout(self.out(attended.flatten(2)))
        return onto + self.scale * (branch if self.norm_out is None else self.norm_out(branch))


class FeedForwardBranch(nn.Module):
    """onto + scale * shrink(geglu(grow(norm(x)))), or another activation; F = ff_mult * C."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        inner = config.ff_mult * config.dim
        self.norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.is_gated = config.activation == "geglu"
        width = 2 * inner if self.is_gated else inner  # value first, then gate
        self.grow = nn.Linear(config.dim, width, dtype=torch.float32)
        self.dropout = nn.Dropout(config.ff_dropout)
        self.shrink = nn.Linear(inner, config.dim, dtype=torch.float32)
        self.norm_out = nn.LayerNorm(config.dim, dtype=torch.float32) if config.sandwich_norm else None
        self.scale: Tensor
        _add_scale(self, config, number, self.shrink)
        self.config = config

    def forward(self, x: Tensor, onto: Tensor, shift: Shift | None = None) -> Tensor:
        """x (B, T, C), onto (B, T, C) -> (B, T, C).

        Args:
            shift: token shift of positions that are not a whole sequence; None: they are one, from <bos> on.
        """
        normed = self.norm(x)
        if shift is not None:
            normed = shift(normed)
        elif self.config.token_shift:
            normed = shift_tokens(normed, self.config)
        branch = self.shrink(self.dropout(self.activate(self.grow(normed))))
        return onto + self.scale * (branch if self.norm_out is None else self.norm_out(branch))

    def activate(self, grown: Tensor) -> Tensor:
        """(..., 2 F) -> (..., F) where it is gated, else (..., F) -> (..., F)."""
        if self.is_gated:
            return geglu(grown)
        return F.gelu(grown) if self.config.activation == "gelu" else quick_gelu(grown)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), which OpenAI's CLIP and minDALL-E have for GELU."""
    return x * torch.sigmoid(1.702 * x)


def layer_scale(number: int) -> float:
    """Initial scale of a branch; `number` counts layers from 1 (CaiT, arXiv 2103.17239, as DALLE-pytorch)."""
    if number <= 18:
        return 0.1
    return 1e-5 if number <= 24 else 1e-6


def _add_scale(branch: nn.Module, config: TransformerConfig, number: int, last: nn.Linear) -> None:
    """Adds the scale (C,) of a branch that ends in `last`, as it starts: learned, or ones that are no weights.

    A branch whose last projection starts at zero adds nothing to begin with, which is what a small scale is for. With
    both, each step of the projection would have a tenth of its effect for no reason: the scale starts at 1 then, which
    is how nanochat and modded-nanogpt, which have no scales, begin.
    """
    if config.zero_init_branches:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    start = 1.0 if config.zero_init_branches or not config.layer_scale else layer_scale(number)
    scale = torch.full((config.dim,), start, dtype=torch.float32)
    if config.layer_scale:
        branch.scale = nn.Parameter(scale)
    else:
        branch.register_buffer("scale", scale, persistent=False)
