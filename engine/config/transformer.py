"""Configuration of the transformer: sizes, and the options in which its families differ."""

from typing import Literal

from pydantic import Field, model_validator

from engine.config.section import Section

AttentionPattern = Literal["full", "axial_row", "axial_col", "conv", "conv_symmetric"]


class TransformerConfig(Section):
    """KoDALLE 16 x 1024 by default: 334,974,336 trainable parameters with 128 text positions, 334,908,736 with 64."""

    dim: int = Field(1024, gt=0, description="width of the residual stream")
    num_layers: int = Field(16, gt=0, description="layers, each of attention and feed-forward")
    num_heads: int = Field(8, gt=0, description="attention heads a layer")
    head_dim: int = Field(64, gt=0, description="width of a head")
    ff_mult: int = Field(4, gt=0, description="inner width of the feed-forward branch over dim")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="on the output of the attention branch")
    ff_dropout: float = Field(0.0, ge=0, lt=1, description="inside the feed-forward branch")
    text_vocab_size: int = Field(32000, gt=4, description="rows of the text token table; the tokenizer's at least")
    text_seq_len: int = Field(128, gt=0, description="text tokens with [CLS] and [SEP]; <bos> comes before them")
    text_position_rows: int = Field(514, gt=0, description="rows of the position table (RoBERTa: 514); row 0 is <bos>")
    unique_padding: bool = Field(
        False,
        description="each padded position has a token row of its own after the vocabulary, as in DALLE-pytorch; padding is 0",
    )
    image_vocab_size: int = Field(16384, gt=1, description="entries of the VQGAN's codebook")
    image_grid_size: int = Field(16, gt=0, description="image tokens along one side")
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
    attention_patterns: tuple[AttentionPattern, ...] = Field(
        ("full",),
        min_length=1,
        description="which cells a cell attends to, cycled over the layers; conv: 5 x 5 up and to the left, before "
        "DALLE-pytorch 1.5 around it (conv_symmetric)",
    )

    @property
    def reads_whole_sequence(self) -> bool:
        """Whether a position's output needs more of those before it than keys and values: it is decoded by whole passes."""
        return self.token_shift or self.rotary or any(pattern != "full" for pattern in self.attention_patterns)

    @property
    def image_seq_len(self) -> int:
        return self.image_grid_size**2

    @property
    def prefix_len(self) -> int:
        """<bos> + text: positions computed once per caption."""
        return 1 + self.text_seq_len

    @property
    def joint_vocab_size(self) -> int:
        """Rows of the published head: text, one reserved row a text position, image."""
        return self.text_vocab_size + self.text_seq_len + self.image_vocab_size

    @model_validator(mode="after")
    def _fits(self) -> "TransformerConfig":
        if self.text_position_rows < self.prefix_len:
            raise ValueError(f"text_position_rows {self.text_position_rows} is less than 1 + text_seq_len")
        if self.reads_whole_sequence and (self.target_positions or self.qk_norm or self.x0_scalars):
            raise ValueError(
                "token_shift, rotary and attention_patterns are DALLE-pytorch's: leave qk_norm, x0_scalars, target_positions out"
            )
        if self.reversible and self.x0_scalars:
            raise ValueError("x0_scalars mix one stream with its start, and reversible has two: leave one out")
        return self
