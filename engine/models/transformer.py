"""KoDALLE: a causal transformer over <bos>, caption and image tokens, with the text tables of a language model.

B sequences, T positions, H heads, D head dim, C model dim, F feed-forward inner dim, V vocabulary.

The maths is that of DALLE-pytorch 1.1.x as KoDALLE used it (KR-HappyFace/KoDALLE: dalle/models.py), so that its
checkpoints can be loaded and its parameter counts agree exactly (334,974,336 with 128 text positions):

    position     0      1 ... Tt     Tt+1 ... Tt+N-1        Tt text positions, N image tokens
    input      <bos>    t1 ... tTt     i1  ...  iN-1        the last image token is never an input
    target      t1      t2 ... i1      i2  ...  iN          positions 0..Tt-1 -> text rows, Tt.. -> image rows

* <bos> is text id 0, put before a caption that itself begins with [CLS] = 0; position rows count from 0.
* [PAD] = 1 is attended to and is a target: nothing is masked but the future.
* Row 1 of both text tables gets no gradient (padding_idx of the language model they come from).
* With unique_padding, as DALLE-pytorch has it, id 0 is padding and becomes text_vocab_size + its position, of which the token
  table has a row each; no row of the tables is then without a gradient.
* Options for small models (`TransformerConfig`: qk_norm, zero_init_branches, x0_scalars, target_positions) are off by
  default and then leave no trace, neither in the parameters nor in the arithmetic. docs/training.md has their sources.
* DALLE-pytorch's reversible, sandwich_norm, stable, token_shift, rotary and attention_patterns are options too, for its checkpoints (docs/importing.md).
* The head is one weight over the joint vocabulary [text | one reserved row per text position | image]. A text
  position may only predict text rows and an image position only image rows; cutting the weight into two views is
  the same function as masking the joint logits, at half the work and memory.

Each module uses only its own parameters in its own forward: DeepSpeed ZeRO-3 gathers them by module.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import TransformerConfig
from engine.models.attention import AttentionBackend, attention, masked_attention, normalised_heads
from engine.models.whole_sequence import pattern_mask, rotated, shift_tokens
from kernels.reference import geglu

_STABLE_GRADIENT = 0.1  # of the embeddings, where the transformer is `stable`
BOS_ID = 0
PAD_ID = 1

# (layer's number from 0, layer, q, k, v (B, T, H, D) each) -> (B, T, H, D)
Attend = Callable[[int, "Layer", Tensor, Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """Losses of one batch, scalars; `loss` is the one to differentiate."""

    loss: Tensor  # (text + w * image) / (1 + w)
    loss_text: Tensor  # mean cross-entropy over all text positions, [PAD] targets included, nats
    loss_image: Tensor  # mean cross-entropy over all image positions, nats
    image_top1: Tensor  # share of image positions whose most likely token is the target; detached


class KoDalle(nn.Module):
    """The KoDALLE transformer.

    Args:
        config: sizes.
        embedding_std: None: torch's defaults, as published (tables N(0, 1)), meant for runs whose text tables
            are then replaced by a language model's. A number (0.02): all tables and position rows N(0, std), which
            small models trained from scratch need, since N(0, 1) inputs dominate their residual branches.
        attention_backend: see engine/models/attention.py.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        embedding_std: float | None = None,
        attention_backend: AttentionBackend = "sdpa",
    ) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = TextEmbedding(config)
        self.image_embedding = ImageEmbedding(config)
        self.layers = nn.ModuleList(Layer(config, number, attention_backend) for number in _layer_numbers(config))
        self.head = JointHead(config)
        self.target_embedding = TargetEmbedding(config) if config.target_positions else None
        if embedding_std is not None:
            self._init_tables(embedding_std)

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        noisy_image_tokens: Tensor | None = None,
        orders: Tensor | None = None,
        *,
        loss_image_weight: float = 7.0,
    ) -> Losses:
        """Losses of captioned images.

        Args:
            text_tokens: (B, text_seq_len) ids from [CLS] on, padded with [PAD].
            image_tokens: (B, image_seq_len) codebook ids, row by row: the targets.
            noisy_image_tokens: like image_tokens; the inputs, where they differ from the targets.
            orders: (B, image_seq_len) int64, of each sequence the order in which its cells are predicted, a permutation;
                None: row by row. Needs target positions.
            loss_image_weight: w in (text + w * image) / (1 + w).
        """
        text_tokens = self.text_embedding.numbered(text_tokens)
        inputs = image_tokens if noisy_image_tokens is None else noisy_image_tokens
        if orders is not None:
            image_tokens, inputs = image_tokens.gather(1, orders), inputs.gather(1, orders)
        text_logits, image_logits = self.logits(text_tokens, inputs, orders)
        loss_text = F.cross_entropy(text_logits.flatten(0, 1).float(), text_tokens.flatten())
        loss_image = F.cross_entropy(image_logits.flatten(0, 1).float(), image_tokens.flatten())
        loss = (loss_text + loss_image_weight * loss_image) / (1 + loss_image_weight)
        with torch.no_grad():
            image_top1 = (image_logits.argmax(-1) == image_tokens).float().mean()
        return Losses(loss, loss_text.detach(), loss_image.detach(), image_top1)

    def logits(self, text_tokens: Tensor, image_tokens: Tensor, orders: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of each position.

        Args:
            text_tokens: (B, text_seq_len).
            image_tokens: (B, n), 1 <= n <= image_seq_len; the last one is not an input.
            orders: (B, n) int64, the grid cells that these tokens are of; None: the first n, row by row.

        Returns:
            (B, text_seq_len, text_vocab_size + text_seq_len) and (B, n, image_vocab_size).
        """
        config = self.config
        assert 1 <= image_tokens.shape[1] <= config.image_seq_len, (image_tokens.shape, config.image_seq_len)
        assert orders is None or self.target_embedding is not None, "other orders need target positions"
        text_logits, image_logits = self.head(
            self.outputs(text_tokens, image_tokens[:, :-1], None if orders is None else orders[:, :-1], orders)
        )
        return text_logits, image_logits

    def outputs(
        self, text_tokens: Tensor, image_tokens: Tensor, cells: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """What the head reads of each position.

        Args:
            text_tokens: (B, text_seq_len).
            image_tokens: (B, n), all of them inputs; n may be 0.
            cells, targets: (B, n) and (B, n + 1) int64, the grid cells that these tokens are of and that they predict; None: the
                first ones, row by row.

        Returns:
            (B, 1 + text_seq_len + n, C).
        """
        config = self.config
        assert text_tokens.shape[1] == config.text_seq_len, (text_tokens.shape, config.text_seq_len)
        text = self.text_embedding(text_tokens)  # (B, 1 + text_seq_len, C)
        image = self.image_embedding(image_tokens, cells)
        if self.target_embedding is None:
            x = torch.cat([text, image], dim=1)
        else:
            predicted = self.target_embedding(image_tokens.shape[1] + 1, targets)  # (B or 1, n + 1, C)
            x = torch.cat([text[:, :-1], torch.cat([text[:, -1:], image], dim=1) + predicted], dim=1)
        if config.stable and torch.is_grad_enabled():
            x = _STABLE_GRADIENT * x + (1 - _STABLE_GRADIENT) * x.detach()
        start = x
        x = self.to_streams(x)
        for layer in self.layers:
            x = layer(x, start)  # (B, 1 + text_seq_len + n, C or 2 C)
        return self.from_streams(x)

    def embed_prefix(self, text_tokens: Tensor) -> Tensor:
        """The layers' input for whole captions, (B, text_seq_len) -> (B, 1 + text_seq_len, C); cells come row by row."""
        x: Tensor = self.text_embedding(text_tokens)
        if self.target_embedding is None:
            return x
        return torch.cat([x[:, :-1], x[:, -1:] + self.target_embedding(1)], dim=1)

    def input_positions(self) -> Tensor:
        """(image_seq_len, C): what the input of each cell carries beside its token, where cells come row by row.

        Its own position and, with target positions, that of the next cell. The last cell is never an input.
        """
        own = self.image_embedding.position_table()
        if self.target_embedding is None:
            return own
        return own + F.pad(self.target_embedding.position_table()[1:], (0, 0, 0, 1))

    def apply_layers(self, x: Tensor, attend: Attend) -> Tensor:
        """The layers around an attention of the caller's, over a cache for example: (B, T, C) -> (B, T, C)."""
        start = x
        x = self.to_streams(x)
        for number, layer in enumerate(cast(list[Layer], list(self.layers))):
            x = layer.mix(x, start)
            q, k, v = layer.project(x)
            x = layer.finish(x, attend(number, layer, q, k, v))
        return self.from_streams(x)

    def to_streams(self, x: Tensor) -> Tensor:
        """Embedded inputs (..., C) -> what the first layer takes: twice the same side by side where there are two streams."""
        return torch.cat([x, x], dim=-1) if self.config.reversible else x

    def from_streams(self, x: Tensor) -> Tensor:
        """What the last layer gives -> (..., C) for the head: the streams' mean, and over its largest channel with `stable`."""
        if self.config.reversible:
            first, second = x.chunk(2, dim=-1)
            x = (first + second) / 2
        return x / x.amax(dim=-1, keepdim=True).detach() if self.config.stable else x

    @torch.no_grad()
    def start_from_codebook(self, codes: Tensor) -> None:
        """Sets the image token table and the head's image rows to two random projections of the VQGAN's codebook.

        Similar codes then start with similar rows, which a model needs to generate a shape in a colour that it was not
        trained on. Standard deviations are kept.

        Args:
            codes: (V_image, E), float.
        """
        assert codes.shape[0] == self.config.image_vocab_size, (codes.shape, self.config.image_vocab_size)
        centred = codes - codes.mean(dim=0)
        weight, bias = self.head.image_rows()
        for rows in (self.image_embedding.tokens, weight):
            projected = centred @ torch.randn(
                codes.shape[1], self.config.dim, dtype=torch.float32, device=codes.device
            )  # (V_image, C)
            rows.copy_(projected * (rows.std() / projected.std()))
        bias.zero_()

    def _init_tables(self, std: float) -> None:
        with torch.no_grad():
            for embedding in (self.text_embedding, self.image_embedding):
                for table in embedding.parameters():
                    table.normal_(0, std)
            self.text_embedding.zero_padding()
            if self.target_embedding is not None:
                for table in (self.target_embedding.rows, self.target_embedding.columns):
                    table.normal_(0, std)


class TextEmbedding(nn.Module):
    """<bos> and caption tokens -> vectors: token row + position row, rows counted from 0, no LayerNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.unique_from = config.text_vocab_size if config.unique_padding else None
        # padding_idx keeps row 1 of both tables without a gradient.
        self.padding_idx = None if config.unique_padding else PAD_ID
        rows = config.text_vocab_size + (config.text_seq_len if config.unique_padding else 0)
        self.tokens = nn.Parameter(torch.randn(rows, config.dim, dtype=torch.float32))
        positions = None if config.rotary else torch.randn(config.text_position_rows, config.dim, dtype=torch.float32)
        self.positions = None if positions is None else nn.Parameter(positions)
        self.zero_padding()

    def forward(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids from [CLS] on -> (B, 1 + T, C)."""
        text_tokens = F.pad(self.numbered(text_tokens), (1, 0), value=BOS_ID)  # (B, 1 + T)
        tokens = F.embedding(text_tokens, self.tokens, padding_idx=self.padding_idx)
        if self.positions is None:
            return tokens
        positions = torch.arange(text_tokens.shape[1], dtype=torch.int64, device=text_tokens.device)
        return tokens + F.embedding(positions, self.positions, padding_idx=self.padding_idx)

    def numbered(self, text_tokens: Tensor) -> Tensor:
        """(B, T) ids, with unique padding those of padded positions instead of 0; doing it twice changes nothing."""
        if self.unique_from is None:
            return text_tokens
        positions = torch.arange(text_tokens.shape[1], dtype=text_tokens.dtype, device=text_tokens.device)
        return torch.where(text_tokens == 0, self.unique_from + positions, text_tokens)

    @torch.no_grad()
    def zero_padding(self) -> None:
        """The initialisation of nn.Embedding(padding_idx=1)."""
        for table in (self.tokens, self.positions):
            if self.padding_idx is not None and table is not None:
                table[self.padding_idx].zero_()


class ImageEmbedding(nn.Module):
    """Image tokens -> vectors: token row + grid row + grid column (axial positions, summed)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.grid_size = config.image_grid_size
        self.tokens = nn.Parameter(torch.randn(config.image_vocab_size, config.dim, dtype=torch.float32))
        shape = (config.image_grid_size, config.dim)
        self.rows = None if config.rotary else nn.Parameter(torch.randn(shape, dtype=torch.float32))
        self.columns = None if config.rotary else nn.Parameter(torch.randn(shape, dtype=torch.float32))

    def forward(self, image_tokens: Tensor, cells: Tensor | None = None) -> Tensor:
        """(B, n) ids of the grid cells (B, n), by default the first n; n may be 0 -> (B, n, C)."""
        table = self.position_table()
        positions = table[: image_tokens.shape[1]] if cells is None else F.embedding(cells, table)
        return F.embedding(image_tokens, self.tokens) + positions

    def position_table(self) -> Tensor:
        """(image_seq_len, C): position embedding of each grid cell, row by row."""
        if self.rows is None or self.columns is None:  # rotary: positions are in the attention
            return self.tokens.new_zeros(self.grid_size**2, self.tokens.shape[1])
        return _axial_table(self.rows, self.columns)


class TargetEmbedding(nn.Module):
    """The grid cell that an input must predict -> a vector that is added to it (RAR, arXiv 2411.00776).

    Tables of its own, axial as the positions of the inputs. RAR learns a vector for each of the g * g cells; these are
    2 * g vectors, each of which is learned from g times as many tokens.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(config.image_grid_size, config.dim, dtype=torch.float32))
        self.columns = nn.Parameter(torch.randn(config.image_grid_size, config.dim, dtype=torch.float32))

    def forward(self, n: int, cells: Tensor | None = None) -> Tensor:
        """Cells (B, n) -> (B, n, C); None: the first n, row by row -> (1, n, C)."""
        table = self.position_table()
        return table[None, :n] if cells is None else F.embedding(cells, table)

    def position_table(self) -> Tensor:
        """(image_seq_len, C)."""
        return _axial_table(self.rows, self.columns)


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

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x and the attention's result (B, T, H, D) -> the next layer's x."""
        first, second = self.streams(x)
        first = self.attention.add(first, attended)
        return self._joined(first, self.feed_forward(first, self._onto(first, second)))

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
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False, dtype=torch.float32)
        self.out = nn.Linear(inner, config.dim, dtype=torch.float32)
        self.dropout = nn.Dropout(config.attention_dropout)  # on the projected output only, as DALLE-pytorch
        self.norm_out = nn.LayerNorm(config.dim, dtype=torch.float32) if config.sandwich_norm else None
        self.scale = _branch_scale(config, number, self.out)
        self.config = config
        self.pattern = config.attention_patterns[(number - 1) % len(config.attention_patterns)]

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
        B, T, _ = x.shape
        normed = self.norm(x)
        if self.config.token_shift:
            normed = shift_tokens(normed, self.config)
        q, k, v = self.qkv(normed).view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        if self.config.rotary:
            q, k, v = (rotated(part, self.config) for part in (q, k, v))
        return (*normalised_heads(q, k), v) if self.qk_norm else (q, k, v)

    def add(self, onto: Tensor, attended: Tensor) -> Tensor:
        """onto (B, T, C) plus the projected, scaled attention output (B, T, H, D)."""
        branch = self.dropout(self.out(attended.flatten(2)))
        return onto + self.scale * (branch if self.norm_out is None else self.norm_out(branch))


class FeedForwardBranch(nn.Module):
    """onto + scale * shrink(geglu(grow(norm(x)))), F = ff_mult * C."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        inner = config.ff_mult * config.dim
        self.norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.grow = nn.Linear(config.dim, 2 * inner, dtype=torch.float32)  # value first, then gate
        self.dropout = nn.Dropout(config.ff_dropout)
        self.shrink = nn.Linear(inner, config.dim, dtype=torch.float32)
        self.norm_out = nn.LayerNorm(config.dim, dtype=torch.float32) if config.sandwich_norm else None
        self.scale = _branch_scale(config, number, self.shrink)
        self.config = config

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        """x (B, T, C), onto (B, T, C) -> (B, T, C); with token shift from <bos> on."""
        normed = self.norm(x)
        if self.config.token_shift:
            normed = shift_tokens(normed, self.config)
        branch = self.shrink(self.dropout(geglu(self.grow(normed))))
        return onto + self.scale * (branch if self.norm_out is None else self.norm_out(branch))


class JointHead(nn.Module):
    """LayerNorm and one Linear over the joint vocabulary, applied as two views of its rows."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_text_positions = config.text_seq_len
        self.num_text_rows = config.text_vocab_size + config.text_seq_len
        self.norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.weight = nn.Parameter(torch.empty(config.joint_vocab_size, config.dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(config.joint_vocab_size, dtype=torch.float32))
        bound = 1 / math.sqrt(config.dim)  # nn.Linear's default
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, text_seq_len + n, C) -> text logits (B, text_seq_len, V_text), image logits (B, n, V_image)."""
        x = self.norm(x)
        text, image = x[:, : self.num_text_positions], x[:, self.num_text_positions :]
        weight, bias = self.weight[: self.num_text_rows], self.bias[: self.num_text_rows]
        return F.linear(text, weight, bias), self.image_logits(image)

    def image_logits(self, normed: Tensor) -> Tensor:
        """(..., C), after `norm` -> (..., V_image)."""
        return F.linear(normed, *self.image_rows())

    def image_rows(self) -> tuple[Tensor, Tensor]:
        """Weight (V_image, C) and bias (V_image,) of the image vocabulary; views."""
        return self.weight[self.num_text_rows :], self.bias[self.num_text_rows :]


def layer_scale(number: int) -> float:
    """Initial scale of a branch; `number` counts layers from 1 (CaiT, arXiv 2103.17239, as DALLE-pytorch)."""
    if number <= 18:
        return 0.1
    return 1e-5 if number <= 24 else 1e-6


def _branch_scale(config: TransformerConfig, number: int, last: nn.Linear) -> nn.Parameter:
    """The learned scale (C,) of a branch that ends in `last`, at its start.

    A branch whose last projection starts at zero adds nothing to begin with, which is what a small scale is for. With
    both, each step of the projection would have a tenth of its effect for no reason: the scale starts at 1 then, which
    is how nanochat and modded-nanogpt, which have no scales, begin.
    """
    if config.zero_init_branches:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    start = 1.0 if config.zero_init_branches else layer_scale(number)
    return nn.Parameter(torch.full((config.dim,), start, dtype=torch.float32))


def _axial_table(rows: Tensor, columns: Tensor) -> Tensor:
    """(g, C) each -> (g * g, C): row + column of each cell, row by row."""
    return (rows[:, None] + columns[None]).flatten(0, 1)


def _layer_numbers(config: TransformerConfig) -> range:
    return range(1, config.num_layers + 1)
