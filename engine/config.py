"""Configuration of models and training runs: strict, frozen sections, read from YAML by engine/config_files.py.

Derived values are properties, never stored. `docs/configuration.md` is generated from the fields and their descriptions
(engine/config_docs.py). Model sections (`VqganConfig`, `TransformerConfig`, `KoclipConfig`) are also what `config.json`
of a model folder holds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.errors import InputError
from engine.sampling_params import FIELDS, GENERATION_FIELDS, SamplingParams


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _in_home(cls, value: Any) -> Any:
        """`~/x` as a shell reads it, which leaves it alone in `run=~/x` and in YAML."""
        if isinstance(value, Path | str) and str(value).startswith("~"):
            try:
                return type(value)(Path(value).expanduser())
            except RuntimeError as error:
                raise ValueError(str(error).rstrip(".")) from error
        return value


# --------------------------------------------------------------------------------------------------- the models


class VqganConfig(Section):
    """VQGAN f16/16384 by default: 76,073,859 parameters without loss modules (taming `VQModel`)."""

    family: Literal["vqgan", "gumbel-vqgan"] = Field(
        "vqgan", description="gumbel-vqgan: taming's `GumbelVQ`, which is imported and not trained here"
    )
    image_size: int = Field(256, gt=0, description="pixels, square")
    base_channels: int = Field(128, gt=0, description="channels of the first level; a multiple of norm_groups")
    channel_multipliers: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4),
        description="channels of each level over base_channels; each level but the last halves the size",
    )
    num_res_blocks: int = Field(2, ge=1, description="residual blocks a level")
    attention_resolutions: tuple[int, ...] = Field((16,), description="map sizes in pixels with self-attention")
    latent_channels: int = Field(256, gt=0, description="encoder output channels (taming: z_channels)")
    embed_dim: int = Field(256, gt=0, description="width of a codebook entry")
    codebook_size: int = Field(
        16384, gt=1, le=65536, description="entries of the codebook; token shards store them as uint16"
    )
    norm_groups: int = Field(
        32, gt=0, description="groups of GroupNorm; taming: 32; narrow networks need fewer, see engine/models/vqgan.py"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="in the residual blocks")
    commitment_weight: float = Field(0.25, ge=0, description="beta of the quantiser's loss")
    legacy_commitment: bool = Field(
        True, description="as in taming, commitment_weight multiplies the codebook term instead of the commitment term"
    )

    @property
    def grid_size(self) -> int:
        """Image tokens along one side."""
        return self.image_size // 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @model_validator(mode="after")
    def _fits(self) -> "VqganConfig":
        if self.image_size % 2 ** (len(self.channel_multipliers) - 1):
            raise ValueError(f"image_size {self.image_size} must be divisible by 2**(levels - 1)")
        if self.base_channels % self.norm_groups:
            raise ValueError(f"norm_groups {self.norm_groups} must divide base_channels {self.base_channels}")
        return self


class DiscreteVaeConfig(Section):
    """DALLE-pytorch's `DiscreteVAE`, imported and not trained here (engine/models/discrete_vae.py)."""

    family: Literal["discrete-vae"] = "discrete-vae"
    image_size: int = Field(gt=0, description="pixels, square")
    image_channels: Literal[3, 4] = Field(3, description="3: RGB; 4: with alpha")
    num_layers: int = Field(ge=1, description="strided convolutions; each halves the size")
    hidden_channels: int = Field(gt=0, description="channels of all layers")
    num_res_blocks: int = Field(0, ge=0, description="residual blocks of encoder and decoder each")
    embed_dim: int = Field(gt=0, description="width of a codebook entry")
    codebook_size: int = Field(gt=1, le=65536, description="entries of the codebook")

    @property
    def grid_size(self) -> int:
        return self.image_size // 2**self.num_layers

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2

    @model_validator(mode="after")
    def _fits(self) -> "DiscreteVaeConfig":
        if self.image_size % 2**self.num_layers:
            raise ValueError(f"image_size {self.image_size} must be divisible by 2**num_layers")
        return self


class OpenaiDvaeConfig(Section):
    """OpenAI's dVAE f8/8192 by default, imported and not trained here (engine/models/openai_dvae.py)."""

    family: Literal["openai-dvae"] = "openai-dvae"
    image_size: int = Field(256, gt=0, multiple_of=8, description="pixels, square")
    hidden_channels: int = Field(
        256, ge=4, description="channels of the finest level; the coarsest has eight times as many"
    )
    decoder_channels: int = Field(128, gt=0, description="channels that the decoder starts with")
    blocks_per_group: int = Field(2, ge=1, description="blocks of each of the four groups")
    codebook_size: int = Field(8192, gt=1, le=65536, description="entries of the codebook")

    @property
    def grid_size(self) -> int:
        return self.image_size // 8

    @property
    def image_seq_len(self) -> int:
        return self.grid_size**2


def _codec_family(tree: Any) -> str:
    """Folders from before there were families hold VQGANs."""
    family = tree.get("family", "vqgan") if isinstance(tree, dict) else getattr(tree, "family", "")
    return "vqgan" if family == "gumbel-vqgan" else str(family)


CodecConfig = Annotated[
    Annotated[VqganConfig, Tag("vqgan")]
    | Annotated[DiscreteVaeConfig, Tag("discrete-vae")]
    | Annotated[OpenaiDvaeConfig, Tag("openai-dvae")],
    Discriminator(_codec_family),
]
"""The codec of a model folder, section `vqgan` of its config.json: one of the families of engine/models/image_codec.py."""


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


class KoclipConfig(Section):
    """EfficientNet-B0 + klue/roberta-base; published: 116,202,620 parameters with `mlp` head and `published` similarity.

    The default similarity, `cosine`, omits RoBERTa's unused pooling layer and has a learned temperature: 115,612,029.
    """

    image_size: int = Field(224, gt=0, description="pixels, square; other sizes are resized")
    image_encoder: Literal["efficientnet", "efficientnet-lite0"] = Field(
        "efficientnet",
        description="efficientnet: of the three sizes below; efficientnet-lite0: of one size, starts from ImageNet weights",
    )
    image_width: float = Field(1.0, gt=0, description="EfficientNet width coefficient (B0: 1.0)")
    image_depth: float = Field(1.0, gt=0, description="EfficientNet depth coefficient (B0: 1.0)")
    image_hidden_dim: int = Field(1280, gt=0, description="features that the image encoder pools; follows image_width")
    text_vocab_size: int = Field(32000, gt=4, description="rows of the text token table; the tokenizer's at least")
    text_seq_len: int = Field(128, gt=2, description="text tokens with [CLS] and [SEP]")
    text_dim: int = Field(768, gt=0, description="width of the text encoder")
    text_layers: int = Field(12, gt=0, description="layers of the text encoder")
    text_heads: int = Field(12, gt=0, description="attention heads a layer; must divide text_dim")
    text_ff_dim: int = Field(3072, gt=0, description="inner width of the text encoder's feed-forward layers")
    text_position_rows: int = Field(514, gt=0, description="rows of the position table; text_seq_len + 2 at least")
    embed_dim: int = Field(512, gt=0, description="width of the shared space")
    head: Literal["mlp", "linear"] = Field("mlp", description="projection of each encoder into the shared space")
    dropout: float = Field(0.1, ge=0, lt=1, description="in the projections and the text encoder")
    similarity: Literal["cosine", "published"] = Field(
        "cosine", description="cosine: normalised, learned temperature; published: raw dot product * 0.07"
    )
    pixels: Literal["resized", "served"] = Field(
        "resized",
        description="served: unresized and in [0, 1], as KoDALLE's code ranked with a KoCLIP trained on 0 to 255",
    )

    @model_validator(mode="after")
    def _fits(self) -> "KoclipConfig":
        if self.text_position_rows < self.text_seq_len + 2:
            raise ValueError("text_position_rows must be at least text_seq_len + 2 (RoBERTa positions start at 2)")
        if self.image_encoder == "efficientnet-lite0":
            self._check_lite0()
        if self.pixels == "served" and self.similarity != "published":
            raise ValueError("pixels served is for similarity published: leave it out")
        return self

    def _check_lite0(self) -> None:
        for name in ("image_width", "image_depth", "image_hidden_dim"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is for image_encoder efficientnet: efficientnet-lite0 has one size, leave it out"
                )
        if self.image_size < 32:
            raise ValueError(f"image_size {self.image_size} is too small for efficientnet-lite0: 32 at least")
        if self.similarity != "cosine":
            raise ValueError("similarity published is for image_encoder efficientnet: leave it out")


class ClipConfig(Section):
    """CLIP of two transformers, ViT-B/32 by default, imported and not trained here (engine/models/clip.py)."""

    family: Literal["clip"] = "clip"
    image_size: int = Field(224, gt=0, description="pixels, square; other sizes are resized")
    patch_size: int = Field(32, gt=0, description="pixels of a patch; must divide image_size")
    image_dim: int = Field(768, gt=0, description="width of the image encoder")
    image_layers: int = Field(12, gt=0, description="layers of the image encoder")
    image_heads: int = Field(12, gt=0, description="attention heads a layer; must divide image_dim")
    image_ff_dim: int = Field(3072, gt=0, description="inner width of the image encoder's feed-forward layers")
    text_vocab_size: int = Field(49408, gt=4, description="rows of the text token table; its tokenizer's at least")
    text_seq_len: int = Field(77, gt=2, description="text tokens with those of start and end")
    text_dim: int = Field(512, gt=0, description="width of the text encoder")
    text_layers: int = Field(12, gt=0, description="layers of the text encoder")
    text_heads: int = Field(8, gt=0, description="attention heads a layer; must divide text_dim")
    text_ff_dim: int = Field(2048, gt=0, description="inner width of the text encoder's feed-forward layers")
    end_token: int = Field(
        49407, ge=0, description="token whose place gives the embedding; 2: the highest token's place"
    )
    embed_dim: int = Field(512, gt=0, description="width of the shared space")
    activation: Literal["quick_gelu", "gelu"] = Field("quick_gelu", description="of the feed-forward layers")
    layer_norm_eps: float = Field(1e-5, gt=0, description="of all LayerNorms")
    image_mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="subtracted from red, green and blue"
    )
    image_std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="that red, green and blue are divided by"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ClipConfig":
        if self.image_dim % self.image_heads or self.text_dim % self.text_heads:
            raise ValueError("image_heads must divide image_dim, and text_heads text_dim")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide image_size {self.image_size}")
        if 0.0 in self.image_std:
            raise ValueError("image_std must not be 0")
        return self


def _ranker_family(tree: Any) -> str:
    """Folders from before there were families hold KoCLIPs."""
    return str(tree.get("family", "koclip") if isinstance(tree, dict) else getattr(tree, "family", "koclip"))


RankerConfig = Annotated[
    Annotated[KoclipConfig, Tag("koclip")] | Annotated[ClipConfig, Tag("clip")], Discriminator(_ranker_family)
]
"""The ranker of a model folder, section `koclip` of its config.json: one of the families of engine/models/ranker.py."""


# ----------------------------------------------------------------------------------------------------- the runs


class DataConfig(Section):
    """The captioned images and how they are loaded."""

    pairs: Path = Field(description="a prepared folder (`kodalle data prepare`) or a folder of name.jpg + name.txt")
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="for plain folders; a prepared one has its split")
    balance: str | None = Field(None, description="attribute whose rare values are sampled more often")
    num_workers: int = Field(0, ge=0, description="processes that prepare batches; 0: the training process does")
    cache_images: bool = Field(False, description="keep decoded uint8 images in memory")
    flip: bool = Field(
        False, description="mirror half of the images; wrong where captions say left or right, or logos matter"
    )


class TextConfig(Section):
    """Tokenization of captions."""

    tokenizer: str = Field("klue/roberta-large", description="Hugging Face name or folder, or `train` (WordPiece)")
    vocab_size: int = Field(32000, gt=8, description="for `train`: at most this many entries")
    partial_captions: int = Field(
        0, ge=0, le=16, description="copies added to each training caption, with sentences left out at random"
    )


def _sampling_field(name: str) -> Any:
    """A sampling parameter with the default, bounds and description that `engine.sampling_params` states."""
    spec = FIELDS[name]
    least = 0 if spec.takes_zero else spec.least
    return Field(spec.default, ge=least, le=spec.greatest, description=f"{spec.description}; {spec.range_text}")


class GenerationConfig(Section):
    """Sampling parameters of a model where a request states none: generation_config.json of its folder."""

    temperature: float = _sampling_field("temperature")
    top_k: int | None = _sampling_field("top_k")
    top_p: float | None = _sampling_field("top_p")
    guidance_scale: float = _sampling_field("guidance_scale")

    @field_validator(*GENERATION_FIELDS)
    @classmethod
    def _in_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        """Also between 0 and the least value, which `ge` lets through."""
        try:
            return FIELDS[str(info.field_name)].check(value)
        except InputError as error:
            raise ValueError(error.remedy) from error

    def sampling_params(self) -> SamplingParams:
        """With the engine's defaults of seed and candidates."""
        return SamplingParams(**self.model_dump())


class VqganLossConfig(Section):
    """Loss of the VQGAN, taming's VQLPIPSWithDiscriminator; defaults from KoDALLE's VQGAN_config.yml."""

    pixel: Literal["l1", "l2", "l1+l2"] = Field(
        "l1", description="distance between the pixels of image and reconstruction"
    )
    codebook_weight: float = Field(1.0, ge=0, description="of the quantiser's loss")
    perceptual: Literal["lpips", "efficientnet-lite0", "none"] = Field(
        "lpips", description="distance in a trained network's features; lpips needs perceptual_weights"
    )
    perceptual_weight: float = Field(1.0, gt=0, description="of the perceptual distance")
    perceptual_weights: Path | None = Field(None, description="for lpips: VGG16 + LPIPS heads as safetensors or .pth")
    perceptual_shift: int = Field(
        0, ge=0, description="largest shift, in pixels, of the window that the perceptual distance sees, step by step"
    )
    disc_start: int = Field(53688, ge=0, description="step from which the discriminator takes part")
    disc_weight: float = Field(0.2, ge=0, description="of the adversarial loss; 0: no discriminator is built")
    feature_weight: float = Field(0.0, ge=0, description="of the distance between the discriminator's hidden features")
    disc_channels: int = Field(64, gt=0, description="channels of the discriminator's first layer")
    disc_layers: int = Field(3, gt=0, description="strided layers of the discriminator")


class CodebookResetConfig(Section):
    """Initialisation and resets of the codebook, for small data: on a few thousand images a plain one collapses."""

    start_step: int = Field(
        0, ge=0, description="first quantised step; the codebook is then set by k-means on the encoder's latents"
    )
    reset_every: int = Field(0, ge=0, description="steps between resets of unused entries to recent latents; 0: never")


class LoopConfig(Section):
    """Length of the run, and the intervals in steps at which things are written."""

    steps: int | None = Field(None, gt=0, description="optimiser steps; either this or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training split; either this or steps")
    validate_every: int = Field(1000, gt=0, description="steps between validations; the best model is exported then")
    validation_batches: int = Field(16, gt=0, description="batches per validation, at most; no image comes twice")
    sample_every: int = Field(1000, gt=0, description="steps between sample images")
    sample_count: int = Field(8, gt=0, description="images per sample")
    checkpoint_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    log_every: int = Field(1, gt=0, description="steps between lines of log.jsonl")
    max_skipped_steps: int = Field(
        50, gt=0, description="stop after this many steps in a row that fp16 skipped (inf or nan gradients)"
    )
    torch_threads: int | None = Field(None, gt=0, description="CPU threads a process; null: its share of the cores")

    @model_validator(mode="after")
    def _one_length(self) -> "LoopConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class OrderAnnealingConfig(Section):
    """Image tokens in random orders at first, row by row in the end (RAR, arXiv 2411.00776)."""

    start: float = Field(0.5, ge=0, le=1, description="fraction of the steps until which all orders are random")
    end: float = Field(0.75, ge=0, le=1, description="fraction of the steps from which no order is random")

    @model_validator(mode="after")
    def _in_order(self) -> "OrderAnnealingConfig":
        if self.end < self.start:
            raise ValueError(f"end {self.end} is before start {self.start}: write a larger end")
        return self

    def random_share(self, progress: float) -> float:
        """Share of the sequences in a random order at a fraction of the steps: 1 until `start`, 0 from `end`."""
        if progress < self.start:
            return 1.0
        return 0.0 if progress >= self.end else (self.end - progress) / (self.end - self.start)


class Run(Section):
    """Sections and keys of every training run."""

    run: Path = Field(description="folder of this run: config.yaml, log.jsonl, checkpoints/, samples/, model/")
    seed: int = Field(42, ge=0, lt=2**32, description="of the weights, the data order and all other randomness")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: from the newest checkpoint; never: an error where there is one"
    )
    start_from: Path | None = Field(
        None,
        description="model folder to train on from; its sizes must be the config's, except text_vocab_size, which may grow",
    )
    data: DataConfig
    loop: LoopConfig
    deepspeed: dict[str, Any] = Field(description="DeepSpeed's own configuration, passed on unchanged")


class VqganRun(Run):
    """Training of a VQGAN: images to a grid of tokens and back."""

    stage: Literal["vqgan"]
    model: VqganConfig = VqganConfig()
    loss: VqganLossConfig = VqganLossConfig()
    codebook_reset: CodebookResetConfig = CodebookResetConfig()
    init: Literal["published", "residual"] = Field(
        "published",
        description="residual: Kaiming convolutions, residual branches start at zero; learns 2x faster on small data",
    )
    decoder_only: bool = Field(
        False,
        description="train the decoder of start_from alone: its tokens keep their meaning, so transformers of them too",
    )

    @model_validator(mode="after")
    def _features_have_room(self) -> "VqganRun":
        window = self.model.image_size - self.loss.perceptual_shift
        if self.loss.perceptual == "efficientnet-lite0" and window < 32:  # its maps are halved five times
            raise ValueError(
                f"loss.perceptual_shift: {self.loss.perceptual_shift} leaves windows of {window} pixels, and "
                "efficientnet-lite0 needs 32: lower it, raise model.image_size, or set loss.perceptual to none"
            )
        return self

    @model_validator(mode="after")
    def _tokens_stay(self) -> "VqganRun":
        if self.decoder_only and self.start_from is None:
            raise ValueError("decoder_only: needs a trained encoder and codebook: give start_from")
        if self.decoder_only and (self.codebook_reset.start_step or self.codebook_reset.reset_every):
            raise ValueError("decoder_only: codebook_reset would change the codebook: leave it out")
        return self


class KoclipRun(Run):
    """Training of a KoCLIP: how well an image fits a caption."""

    stage: Literal["koclip"]
    model: KoclipConfig = KoclipConfig()
    text: TextConfig = TextConfig(tokenizer="klue/roberta-base")
    pretrained_text_encoder: str | None = Field(None, description="Hugging Face RoBERTa, name or folder")
    pretrained_image_encoder: str | None = Field(None, description="Hugging Face EfficientNet, name or folder")
    encoder_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of the encoders over that of the projections (published: 0.8)"
    )
    image_encoder_lr_ratio: float | None = Field(
        None, ge=0, description="the same for the image encoder alone; 0: it is frozen; null: as encoder_lr_ratio"
    )
    augment_shift: int = Field(0, ge=0, description="largest random translation, in pixels")
    codec: Path | None = Field(
        None, description="model folder with a VQGAN: half of the visits see its reconstruction of the image"
    )
    spliced_negatives: float = Field(
        0.0,
        ge=0,
        le=1,
        description="images with a piece of another for each image, added as negatives: broken generations rank low",
    )

    @model_validator(mode="after")
    def _encoder_source(self) -> "KoclipRun":
        if self.pretrained_image_encoder is not None and self.model.image_encoder != "efficientnet":
            raise ValueError(
                f"pretrained_image_encoder {self.pretrained_image_encoder} is for image_encoder efficientnet: "
                f"{self.model.image_encoder} starts from weights of its own, leave it out"
            )
        return self


class KodalleRun(Run):
    """Training of a KoDALLE transformer: image tokens from captions."""

    stage: Literal["kodalle"]
    model: TransformerConfig = TransformerConfig()
    text: TextConfig = TextConfig()
    vqgan: Path = Field(description="model folder with the trained VQGAN")
    koclip: Path | None = Field(None, description="model folder with the trained KoCLIP, exported with the transformer")
    pretrained_text_embeddings: str | None = Field(
        None, description="Hugging Face RoBERTa or GPT whose token and position tables are copied (klue/roberta-large)"
    )
    embedding_std: float | None = Field(
        None, gt=0, description="initial std of the tables; null: 1 as published; small models from scratch need 0.02"
    )
    codebook_init: bool = Field(
        False,
        description="initialise image token and head rows from the VQGAN's codebook, so that similar codes start alike",
    )
    attention: Literal["sdpa", "xformers", "reference"] = Field(
        "sdpa", description="attention backend; xformers needs a GPU"
    )
    loss_image_weight: float = Field(7.0, gt=0, description="loss = (text + w * image) / (1 + w)")
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of captions replaced by the empty one, for guidance"
    )
    input_token_noise: float = Field(
        0.0, ge=0, le=1, description="largest share of an image's input tokens replaced by random ones; targets stay"
    )
    order_annealing: OrderAnnealingConfig | None = Field(
        None, description="train in random orders first; null: row by row only. Needs model.target_positions"
    )
    weight_decay_on: Literal["all", "matrices"] = Field(
        "all", description="matrices: the optimizer's weight_decay spares tables, head, biases, norms and scales"
    )
    generation: GenerationConfig = Field(
        GenerationConfig(), description="exported with the model: its default sampling parameters"
    )
    augmented_views: int = Field(
        0, ge=0, le=64, description="copies of each training image that are encoded too, translated by augment_shift"
    )
    augment_shift: int = Field(0, ge=0, description="largest random translation of augmented_views, in pixels")
    token_shards: Path | None = Field(None, description="folder of the encoded images; null: <run>/shards")
    strict_captions: bool = Field(
        False, description="captions longer than text_seq_len are an error; false: they are cut"
    )

    @model_validator(mode="after")
    def _orders_have_targets(self) -> "KodalleRun":
        if self.order_annealing is not None and not self.model.target_positions:
            raise ValueError(
                "order_annealing: an input cannot know which cell comes next without model.target_positions: true"
            )
        return self

    @model_validator(mode="after")
    def _views_are_shifted(self) -> "KodalleRun":
        if (self.augmented_views > 0) != (self.augment_shift > 0):
            raise ValueError(
                f"augmented_views {self.augmented_views} and augment_shift {self.augment_shift} go together: "
                "give both a number above 0, or neither"
            )
        return self


AnyRun = Annotated[VqganRun | KoclipRun | KodalleRun, Field(discriminator="stage")]
