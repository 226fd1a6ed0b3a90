"""Configuration of the transformer: sizes, and the options in which its families differ."""

from typing import Literal

from pydantic import Field, model_validator

from engine.config.section import Section

AttentionPattern = Literal[
    "full", "axial_row", "axial_col", "conv", "conv_symmetric", "dalle_row", "dalle_col", "dalle_conv"
]


class TransformerConfig(Section):
    """KoDALLE 16 x 1024 by default: 334,974,336 trainable parameters with 128 text positions, 334,908,736 with 64."""

    dim: int = Field(1024, gt=0, description="width of the residual stream")
    num_layers: int = Field(16, gt=0, description="layers, each of attention and feed-forward")
    num_heads: int = Field(8, gt=0, description="attention heads a layer")
    head_dim: int = Field(64, gt=0, description="width of a head")
    ff_mult: int = Field(4, gt=0, description="inner width of the feed-forward branch over dim")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="on the output of the attention branch")
    ff_dropout: float = Field(0.0, ge=0, lt=1, description="inside the feed-forward branch")
    text_vocab_size: int = Field(
        32000,
        gt=0,
        description="rows of the text token table; the tokenizer's at least; of condition class: the classes",
    )
    text_seq_len: int = Field(
        128,
        gt=0,
        description="text tokens with [CLS] and [SEP]; <bos> comes before them; 1 where condition is not text",
    )
    text_position_rows: int = Field(514, gt=0, description="rows of the position table (RoBERTa: 514); row 0 is <bos>")
    text_embedding_dim: int | None = Field(
        None,
        gt=0,
        description="width of the text tables where it is a language model's (KoGPT-Trinity: 1920), projected to dim; null: dim",
    )
    unique_padding: bool = Field(
        False,
        description="each padded position has a learned token row of its own after the vocabulary (DALL-E, DALLE-pytorch)",
    )
    padding_token: int | None = Field(
        None,
        ge=0,
        description="the tokenizer's padding; null: 1, and 0 with unique_padding; without that its row is not trained",
    )
    image_vocab_size: int = Field(16384, gt=1, description="entries of the VQGAN's codebook")
    image_grid_size: int = Field(16, gt=0, description="image tokens along one side")
    condition: Literal["text", "class", "nothing"] = Field(
        "text",
        description="what comes before an image: a caption; its class, one row of the text table; or one learned start",
    )
    bos: bool = Field(
        True,
        description="<bos> before the text; without it, as in minDALL-E, the last text token predicts the first cell",
    )
    image_positions: Literal["axial", "learned"] = Field(
        "axial", description="axial: a row's vector + a column's; learned: one a cell, as in minDALL-E"
    )
    qkv_bias: bool = Field(False, description="queries, keys and values have a bias")
    activation: Literal["geglu", "gelu", "quick_gelu"] = Field(
        "geglu", description="of the feed-forward branch; the last two have no gate; quick_gelu: x * sigmoid(1.702 x)"
    )
    layer_scale: bool = Field(True, description="a learned scale on every branch")
    separate_heads: bool = Field(
        False, description="a head for text and one for images, without bias and reserved rows, instead of a joint one"
    )
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys of each head, without weights")
    zero_init_branches: bool = Field(
        False, description="start the last projection of every branch at 0 and the branches' scales at 1"
    )
    x0_scalars: bool = Field(
        False,
        description="two scalars a layer: its input is r * x + s * the first layer's input; r starts at 1, s at 0",
    )
    target_positions: bool = Field(
        False, description="each input also carries the position of the token that it predicts; for order_annealing"
    )

    reversible: bool = Field(
        False, description="two residual streams: attention reads the second onto the first, feed-forward the other way"
    )
    sandwich_norm: bool = Field(False, description="a LayerNorm after every branch too, before its scale")
    stable: bool = Field(
        False,
        description="DALLE-pytorch's: the head reads vectors over their largest channel; embeddings get a tenth of the gradient",
    )

    token_shift: bool = Field(
        False, description="each branch reads some channels of the position before, of the cells above and to the left"
    )
    rotary: bool = Field(False, description="positions turn queries, keys and values, instead of tables that are added")
    attention_patterns: tuple[AttentionPattern, ...] | Literal["dalle"] = Field(
        ("full",),
        description="which cells a cell attends to, cycled over the layers; conv: 5 x 5 up and to the left, before "
        "DALLE-pytorch 1.5 around it (conv_symmetric); `dalle`: DALL-E's own rows, columns and last convolution",
    )

    @property
    def patterns(self) -> tuple[AttentionPattern, ...]:
        """The attention pattern of each layer."""
        if self.attention_patterns == "dalle":
            return dalle_patterns(self.num_layers)
        patterns: tuple[AttentionPattern, ...] = self.attention_patterns
        return tuple(patterns[n % len(patterns)] for n in range(self.num_layers))

    @property
    def depends_on_positions(self) -> bool:
        """Whether layers need to know where in the sequence an input lies, beyond what is before it."""
        return self.token_shift or self.rotary or any(pattern != "full" for pattern in self.patterns)

    @property
    def image_seq_len(self) -> int:
        return self.image_grid_size**2

    @property
    def padding_id(self) -> int:
        """Text token of padded positions; DALLE-pytorch's is 0, klue/roberta's 1."""
        return (0 if self.unique_padding else 1) if self.padding_token is None else self.padding_token

    @property
    def prefix_len(self) -> int:
        """<bos> + text: positions computed once per caption."""
        return self.bos + self.text_seq_len

    @property
    def num_text_targets(self) -> int:
        """Positions that predict a text token; the one after them predicts the first image token."""
        return self.prefix_len - 1

    @property
    def text_head_rows(self) -> int:
        """Rows of the head for text, with one reserved row a text position where it is joint."""
        if self.condition != "text":
            return 0
        return self.text_vocab_size + (0 if self.separate_heads else self.text_seq_len)

    @property
    def joint_vocab_size(self) -> int:
        """Rows of the published head: text, one reserved row a text position, image."""
        return self.text_head_rows + self.image_vocab_size

    @model_validator(mode="after")
    def _fits(self) -> "TransformerConfig":
        if not self.attention_patterns:
            raise ValueError("attention_patterns is empty: write [full]")
        if self.text_position_rows < self.prefix_len:
            raise ValueError(
                f"text_position_rows {self.text_position_rows} is less than {'1 + ' * self.bos}text_seq_len"
            )
        if self.padding_id >= self.text_vocab_size and self.condition == "text":
            raise ValueError(f"padding_token {self.padding_id} is not below text_vocab_size {self.text_vocab_size}")
        if self.condition != "text" and (self.text_seq_len != 1 or self.bos or self.unique_padding):
            raise ValueError(
                f"condition {self.condition} is one position: write text_seq_len: 1, bos: false, unique_padding: false"
            )
        if self.condition == "nothing" and self.text_vocab_size != 1:
            raise ValueError("condition nothing is one learned start: write text_vocab_size: 1")
        if self.depends_on_positions and (self.target_positions or self.qk_norm or self.x0_scalars):
            raise ValueError(
                "token_shift, rotary and attention_patterns are DALLE-pytorch's: leave qk_norm, x0_scalars, target_positions out"
            )
        if self.reversible and self.x0_scalars:
            raise ValueError("x0_scalars mix one stream with its start, and reversible has two: leave one out")
        return self


def dalle_patterns(num_layers: int) -> tuple[AttentionPattern, ...]:
    """DALL-E's pattern of each layer: columns in layers 2, 6, 10 … (from 1), a convolution in the last, rows elsewhere."""
    patterns: list[AttentionPattern] = [
        "dalle_col" if number % 4 == 2 else "dalle_row" for number in range(1, num_layers)
    ]
    return (*patterns, "dalle_conv")
