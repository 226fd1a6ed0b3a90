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
* With unique_padding, as DALL-E and DALLE-pytorch have it, padding becomes text_vocab_size + its position, of which the token
  table has a row each; no row of the tables is then without a gradient.
* Text tables of another width (a GPT's) are summed and then projected to C by one matrix.
* Options for small models (`TransformerConfig`: qk_norm, zero_init_branches, x0_scalars, target_positions) are off by
  default and then leave no trace, neither in the parameters nor in the arithmetic. docs/training.md has their sources.
* DALLE-pytorch's and minDALL-E's differences are options too, for their checkpoints (docs/interop.md). Without bos the last text
  position predicts the first image token; a class or a learned start instead of a text is one position, and predicts no text.
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

from engine.config.transformer import TransformerConfig
from engine.models.attention import AttentionBackend
from engine.models.transformer_embeddings import ImageEmbedding, TargetEmbedding, TextEmbedding
from engine.models.transformer_layer import Layer

_STABLE_GRADIENT = 0.1  # of the embeddings, where the transformer is `stable`

# (layer's number from 0, layer, q, k, v (B, T, H, D) each) -> (B, T, H, D)
Attend = Callable[[int, Layer, Tensor, Tensor, Tensor], Tensor]


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
        targets = text_tokens[:, text_tokens.shape[1] - self.config.num_text_targets :]
        has_text = self.config.condition == "text" and targets.numel() > 0
        loss_text = (
            F.cross_entropy(text_logits.flatten(0, 1).float(), targets.flatten())
            if has_text
            else image_logits.new_zeros((), dtype=torch.float32)
        )
        loss_image = F.cross_entropy(image_logits.flatten(0, 1).float(), image_tokens.flatten())
        loss = (loss_text + loss_image_weight * loss_image) / (1 + loss_image_weight) if has_text else loss_image
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
            (B, num_text_targets, text_head_rows) and (B, n, image_vocab_size).
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
            for table in (*self.text_embedding.tables(), *self.image_embedding.parameters()):
                table.normal_(0, std)
            self.text_embedding.zero_padding()
            if self.target_embedding is not None:
                for table in (self.target_embedding.rows, self.target_embedding.columns):
                    table.normal_(0, std)


class JointHead(nn.Module):
    """LayerNorm and one Linear over the joint vocabulary, applied as two views of its rows.

    `separate_heads` are the same without a bias and without reserved rows.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_text_positions = config.num_text_targets
        self.num_text_rows = config.text_head_rows
        self.norm = nn.LayerNorm(config.dim, dtype=torch.float32)
        self.weight = nn.Parameter(torch.empty(config.joint_vocab_size, config.dim, dtype=torch.float32))
        bound = 1 / math.sqrt(config.dim)  # nn.Linear's default
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias: Tensor
        if config.separate_heads:
            self.register_buffer("bias", torch.zeros(config.joint_vocab_size, dtype=torch.float32), persistent=False)
        else:
            self.bias = nn.Parameter(torch.empty(config.joint_vocab_size, dtype=torch.float32))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, num_text_targets + n, C) -> text logits (B, num_text_targets, V_text), image logits (B, n, V_image)."""
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


def _layer_numbers(config: TransformerConfig) -> range:
    return range(1, config.num_layers + 1)
