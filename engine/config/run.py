"""Configuration that every training stage shares: captioned images, tokenization, length of the run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from engine.config.section import FolderOrName, Section

CropKind = Literal["dalle", "dalle-prototype"]


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
    crop: CropKind | None = Field(
        None,
        description="near-central crops of images of any shape, other ones at each visit; null: images are stretched to the square",
    )


class TextConfig(Section):
    """Tokenization of captions."""

    tokenizer: FolderOrName = Field(
        "klue/roberta-large",
        description="Hugging Face name or folder, `train` (WordPiece), or `train-bpe` (byte-pair encoding, nothing unknown)",
    )
    vocab_size: int = Field(
        32000, gt=8, description="for `train` and `train-bpe` (DALL-E: 16384): at most this many entries"
    )
    lowercase: bool = Field(False, description="for `train` and `train-bpe`: upper case is read as lower case (DALL-E)")
    bpe_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="merges of a `train-bpe` tokenizer left out at random in training (DALL-E: 0.1); never in validation or generation",
    )
    partial_captions: int = Field(
        0, ge=0, le=16, description="copies added to each training caption, with sentences left out at random"
    )

    @property
    def is_trained(self) -> bool:
        """Whether the tokenizer follows from the training captions."""
        return self.tokenizer in ("train", "train-bpe")

    @model_validator(mode="after")
    def _is_of_its_tokenizer(self) -> "TextConfig":
        if self.lowercase and not self.is_trained:
            raise ValueError(
                f"lowercase is for train and train-bpe: {self.tokenizer} has rules of its own, leave it out"
            )
        if self.bpe_dropout > 0 and self.tokenizer == "train":
            raise ValueError("bpe_dropout leaves out merges, and WordPiece has none: write tokenizer: train-bpe")
        return self


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


class PowerSgdConfig(Section):
    """Gradients of several ranks averaged in compressed form (PowerSGD), for slow links; see engine/training/power_sgd.py."""

    rank: int = Field(
        4, ge=1, description="columns of the factors of a gradient: more are nearer to it, and more to send"
    )
    start_step: int = Field(100, ge=0, description="first steps, whose gradients are averaged exactly")


class Run(Section):
    """Sections and keys of every training run."""

    run: Path = Field(description="folder of this run: config.yaml, log.jsonl, checkpoints/, samples/, model/")
    seed: int = Field(42, ge=0, lt=2**32, description="of the weights, the data order and all other randomness")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: from the newest checkpoint; never: an error where there is one"
    )
    start_from: Path | None = Field(
        None,
        description="model folder to train on from; its sizes must be the config's, except text_vocab_size, which may grow, and "
        "image_size where no attention sees the image",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="validate and export the exponential moving average of the weights, e.g. 0.999; null: the weights",
    )
    gradient_compression: PowerSgdConfig | None = Field(
        None,
        description="for data-parallel runs over slow links, at ZeRO stage 0; null: gradients are averaged exactly",
    )
    data: DataConfig
    loop: LoopConfig
    deepspeed: dict[str, Any] = Field(description="DeepSpeed's own configuration, passed on unchanged")
