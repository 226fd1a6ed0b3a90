"""Configuration of the rankers: sizes of each family, section `koclip` of a model folder's config.json."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from engine.config.section import Section


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
    ranking: Literal["cosine", "contrast"] = Field(
        "cosine",
        description="of candidates; contrast: by how much better the caption fits than wrong ones, fact by fact",
    )
    pixels: Literal["resized", "served"] = Field(
        "resized",
        description="served: unresized and in [0, 1], as KoDALLE's code ranked with a KoCLIP trained on 0 to 255",
    )
    token_similarity: bool = Field(
        False,
        description="FILIP: the mean over a caption's tokens of the most similar image cell's cosine; cosine only",
    )
    direction_projections: bool = Field(
        False,
        description="projections of their own for each direction, image of a caption and caption of an image; cosine only",
    )

    @model_validator(mode="after")
    def _fits(self) -> "KoclipConfig":
        if self.text_position_rows < self.text_seq_len + 2:
            raise ValueError("text_position_rows must be at least text_seq_len + 2 (RoBERTa positions start at 2)")
        if self.ranking == "contrast" and self.similarity == "published":
            raise ValueError("ranking contrast needs the temperature of similarity cosine: write ranking cosine")
        if self.image_encoder == "efficientnet-lite0":
            self._check_lite0()
        if self.pixels == "served" and self.similarity != "published":
            raise ValueError("pixels served is for similarity published: leave it out")
        for name in ("token_similarity", "direction_projections"):
            if getattr(self, name) and self.similarity != "cosine":
                raise ValueError(f"{name} is for similarity cosine: leave it out")
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
