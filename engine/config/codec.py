"""Configuration of the codecs: sizes of each family, section `vqgan` of a model folder's config.json."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from engine.config.section import Section

CodecBackend = Literal["torch", "onnx"]
"""What computes a codec and a ranker: engine/codec/codec.py."""


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
    """OpenAI's dVAE f8/8192 by default: 97,616,006 parameters (engine/models/openai_dvae.py)."""

    family: Literal["openai-dvae"] = Field("openai-dvae", description="DALL-E's own architecture")
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
