"""Configuration of a training run, one class a stage: VQGAN, dVAE, KoCLIP, KoDALLE."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.codec import OpenaiDvaeConfig, VqganConfig
from engine.config.generation import GenerationConfig
from engine.config.ranker import KoclipConfig
from engine.config.run import Run, TextConfig
from engine.config.section import FolderOrName, Section
from engine.config.transformer import TransformerConfig


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


class KoclipLossConfig(Section):
    """What a KoCLIP's training compares (engine/models/koclip_losses.py, koclip_objectives.py); x-clip's options, off by default.

    The weights of image_ssl and masked_language are shares of the loss, and the contrastive loss has the rest.
    """

    decoupled: bool = Field(
        False, description="DCL: the pair itself is left out of the contrastive loss's denominator (arXiv 2110.06848)"
    )
    image_ssl: Literal["simclr", "simsiam"] | None = Field(
        None,
        description="two views of each image, in three times the image encoder's work: SimCLR or SimSiam; null: off",
    )
    image_ssl_weight: float = Field(0.05, gt=0, lt=1, description="share of the loss, with image_ssl")
    image_ssl_dim: int = Field(256, gt=0, description="width of the projections, with image_ssl")
    image_ssl_hidden_dim: int = Field(4096, gt=0, description="inner width of projector and predictor, with image_ssl")
    image_ssl_temperature: float = Field(0.1, gt=0, description="that cosines are divided by, with image_ssl simclr")
    image_ssl_colour: float = Field(
        1.0, ge=0, le=1, description="strength of the views' changes of colour; 0, where captions name colours: none"
    )
    masked_language_weight: float = Field(
        0.0, ge=0, lt=1, description="of masked captions, share of the loss (x-clip: 0.05); 0: off"
    )
    masked_language_share: float = Field(0.15, gt=0, lt=1, description="of a caption's tokens, masked")

    @model_validator(mode="after")
    def _leaves_room(self) -> "KoclipLossConfig":
        if self.contrastive_weight <= 0:
            raise ValueError("image_ssl_weight and masked_language_weight leave nothing for the pairs: lower them")
        return self

    @property
    def contrastive_weight(self) -> float:
        """Of the contrastive loss: what the others leave."""
        return 1.0 - (0.0 if self.image_ssl is None else self.image_ssl_weight) - self.masked_language_weight

    @property
    def has_objectives(self) -> bool:
        """Whether anything is learned beside the pairs."""
        return self.image_ssl is not None or self.masked_language_weight > 0


class CosineScheduleConfig(Section):
    """A value that follows half a cosine from `start` to `end`, and stays there. Without `steps` it takes all of the run."""

    start: float = Field(ge=0, description="value of the first step")
    end: float = Field(ge=0, description="value from the last of `steps` on")
    steps: int | None = Field(None, gt=0, description="optimiser steps between them; null: all of the run")

    def value(self, step: int, *, total_steps: int) -> float:
        """The value at a step, counted from 0."""
        progress = min(1.0, step / (total_steps if self.steps is None else self.steps))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


class DvaeRun(Run):
    """Training of a dVAE, the codec of the DALL-E paper: images to a grid of tokens and back, by a relaxation of the codes.

    Schedules are those of the paper (arXiv 2102.12092, appendix A.2), for 3,000,000 steps of 512 images; short runs need shorter ones.
    """

    stage: Literal["dvae"]
    model: OpenaiDvaeConfig = OpenaiDvaeConfig()
    temperature: CosineScheduleConfig = Field(
        CosineScheduleConfig(start=1.0, end=1 / 16, steps=150_000),
        description="of the relaxation: near 0 the decoder reads the codes themselves",
    )
    kl_weight: CosineScheduleConfig = Field(
        CosineScheduleConfig(start=0.0, end=6.6, steps=5_000),
        description="beta, of the divergence of the codes from uniform ones; the whole bound is divided by the values of an image",
    )
    lr_schedule: CosineScheduleConfig | None = Field(
        None,
        description="factor of deepspeed.optimizer.params.lr, in place of deepspeed.scheduler, which cannot stay at its end "
        "(published: 1 to 0.0125 in 1,200,000 steps); null: deepspeed.scheduler's",
    )
    least_scale: float = Field(
        0.0,
        ge=0,
        description="added to the scales of the likelihood, which has no bound on ground of one colour, as around cut-outs; "
        "0.01 is about a grey level; published: 0",
    )
    augment_shift: int = Field(0, ge=0, description="largest random translation, in pixels")

    @model_validator(mode="after")
    def _temperature_is_above_zero(self) -> "DvaeRun":
        for name in ("start", "end"):
            if getattr(self.temperature, name) == 0:
                raise ValueError(f"temperature.{name}: 0 has no gradient: write a value above 0, e.g. 0.0625")
        return self

    @model_validator(mode="after")
    def _one_rate(self) -> "DvaeRun":
        if self.lr_schedule is not None and "scheduler" in self.deepspeed:
            raise ValueError("lr_schedule: deepspeed.scheduler states the rate, too: leave one of them out")
        return self


class KoclipRun(Run):
    """Training of a KoCLIP: how well an image fits a caption."""

    stage: Literal["koclip"]
    model: KoclipConfig = KoclipConfig()
    loss: KoclipLossConfig = KoclipLossConfig()
    text: TextConfig = TextConfig(tokenizer="klue/roberta-base")
    pretrained_text_encoder: FolderOrName | None = Field(None, description="Hugging Face RoBERTa, name or folder")
    pretrained_image_encoder: FolderOrName | None = Field(None, description="Hugging Face EfficientNet, name or folder")
    encoder_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of the encoders over that of the projections (published: 0.8)"
    )
    image_encoder_lr_ratio: float | None = Field(
        None, ge=0, description="the same for the image encoder alone; 0: it is frozen; null: as encoder_lr_ratio"
    )
    augment_shift: int = Field(0, ge=0, description="largest random translation, in pixels")
    codec: Path | None = Field(
        None, description="model folder with a codec: half of the visits see its reconstruction of the image"
    )
    spliced_negatives: float = Field(
        0.0,
        ge=0,
        le=1,
        description="images with a piece of another for each image, added as negatives: broken generations rank low",
    )
    hard_negative_captions: int = Field(
        0,
        ge=0,
        le=16,
        description="for each image, versions of its caption with one fact changed or two colours exchanged, as negatives",
    )

    @model_validator(mode="after")
    def _encoder_source(self) -> "KoclipRun":
        if self.pretrained_image_encoder is not None and self.model.image_encoder != "efficientnet":
            raise ValueError(
                f"pretrained_image_encoder {self.pretrained_image_encoder} is for image_encoder efficientnet: "
                f"{self.model.image_encoder} starts from weights of its own, leave it out"
            )
        return self

    @model_validator(mode="after")
    def _views_train_the_encoder(self) -> "KoclipRun":
        if self.loss.image_ssl is not None and self.image_encoder_lr_ratio == 0:
            raise ValueError(
                f"loss.image_ssl {self.loss.image_ssl} trains the image encoder, and image_encoder_lr_ratio 0 freezes it: "
                "leave one of them out"
            )
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


class KodalleRun(Run):
    """Training of a KoDALLE transformer: image tokens from captions."""

    stage: Literal["kodalle"]
    model: TransformerConfig = TransformerConfig()
    text: TextConfig = TextConfig()
    vqgan: Path = Field(description="model folder with the trained codec, a VQGAN or a dVAE")
    koclip: Path | None = Field(None, description="model folder with the trained KoCLIP, exported with the transformer")
    pretrained_text_embeddings: FolderOrName | None = Field(
        None, description="Hugging Face RoBERTa or GPT whose token and position tables are copied (klue/roberta-large)"
    )
    embedding_std: float | None = Field(
        None, gt=0, description="initial std of the tables; null: 1 as published; small models from scratch need 0.02"
    )
    codebook_init: bool = Field(
        False,
        description="initialise image token and head rows from the VQGAN's codebook, so that similar codes start alike",
    )
    attention: Literal["auto", "sdpa", "xformers", "reference"] = Field(
        "auto", description="attention backend; auto: the fastest that runs, measured on a GPU; xformers needs a GPU"
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
    resblock_gradient_scaling: bool = Field(
        False,
        description="for fp16 with a static loss_scale: a loss scale for each branch, in the place of one that moves (DALL-E)",
    )
    generation: GenerationConfig = Field(
        GenerationConfig(), description="exported with the model: its default sampling parameters"
    )
    augmented_views: int = Field(
        0,
        ge=0,
        le=64,
        description="copies of each training image that are encoded too, translated by augment_shift or cropped by data.crop",
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
        is_same_image = self.augmented_views > 0 and self.augment_shift == 0 and self.data.crop is None
        if is_same_image or (self.augment_shift > 0 and self.augmented_views == 0):
            raise ValueError(
                f"augmented_views {self.augmented_views} and augment_shift {self.augment_shift} go together: "
                "give both a number above 0, or neither"
            )
        return self


AnyRun = Annotated[VqganRun | DvaeRun | KoclipRun | KodalleRun, Field(discriminator="stage")]
