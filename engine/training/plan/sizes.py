"""The table that sizes are chosen by: images and captions in number and kind, and the machine, to the sizes of three models.

docs/training.md has the same table in words. Every choice carries its reason, which is printed. The numbers for a CPU are
those of configs/demo and configs/clothing, which were trained and measured; those for a GPU are of configs/clothing/gpu and
configs/kodalle. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.training.plan.facts import DatasetFacts, MachineFacts

GIB = 2**30
STAGES = ("vqgan", "koclip", "kodalle")
SHORT_MINUTES = 15  # below, a CPU learns nothing of 64 pixels
_FEW_FOR_A_DISCRIMINATOR = 1000
_HARD_NEGATIVES = 2  # as in configs/clothing/koclip.yaml


@dataclass(frozen=True)
class Transformer:
    """Sizes of a transformer, for training sets of at most so many pairs."""

    most_pairs: float
    dim: int
    layers: int
    heads: int
    head_dim: int
    ff_mult: int
    dropout: float


TRANSFORMERS = (
    Transformer(300, 128, 3, 4, 32, 2, 0.2),
    Transformer(2_000, 192, 4, 6, 32, 2, 0.1),
    Transformer(20_000, 256, 6, 8, 32, 2, 0.1),
    Transformer(50_000, 512, 8, 8, 64, 4, 0.1),
    Transformer(300_000, 768, 12, 12, 64, 4, 0.0),
    Transformer(float("inf"), 1024, 16, 8, 64, 4, 0.0),
)
_LARGEST_ON_CPU = 256
_LARGEST_SMALL = 256  # the width that configs/clothing has tried qk_norm, zero_init_branches, x0_scalars and Muon at

# Each level but the last halves the image, so that 4 levels make one token of 8 x 8 pixels.
_LEVELS: dict[int, tuple[int, ...]] = {
    32: (1, 2, 4), 64: (1, 1, 2, 4), 96: (1, 1, 2, 4), 128: (1, 1, 2, 4), 256: (1, 1, 2, 2, 4),
}  # fmt: skip
_LEAST_MINUTES_FOR_96 = 120  # on a CPU


@dataclass(frozen=True)
class Schedule:
    """Length of a stage."""

    steps: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that is chosen; `reasons` has a sentence for each line that is printed."""

    device: str
    gpus: int
    has_bf16: bool
    image_size: int
    levels: tuple[int, ...]
    base_channels: int
    codebook_size: int
    discriminator: bool
    text_vocab_size: int
    text_seq_len: int
    transformer: Transformer
    large_ranker: bool
    hard_negative_captions: int
    augmented_views: int
    flip: bool
    threads: int
    split_fraction: float
    split_seed: int
    schedules: dict[str, Schedule]
    bf16_on_cpu: bool = False  # for the VQGAN, where it is measured to be faster
    reasons: dict[str, tuple[str, str]] = field(compare=False)

    @property
    def grid(self) -> int:
        """Image tokens along one side."""
        return self.image_size // 2 ** (len(self.levels) - 1)

    @property
    def small_transformer(self) -> bool:
        """Whether the transformer gets the options for small models, and Muon, which needs bf16 or float32."""
        return self.transformer.dim <= _LARGEST_SMALL and (self.device == "cpu" or self.has_bf16)


def choose_sizes(data: DatasetFacts, machine: MachineFacts, *, minutes: float | None = None) -> Sizes:
    """The table. Steps are for a run without a time budget; `minutes` only makes the images smaller.

    Args:
        minutes: the whole run's budget, if it has one.
    """
    on_gpu = machine.device != "cpu"
    image_size, size_reason = _image_size(data, machine, minutes)
    levels = _LEVELS[image_size]
    grid = image_size // 2 ** (len(levels) - 1)
    codebook, codebook_reason = _codebook(data.train, grid, on_gpu=on_gpu)
    transformer, transformer_reason = _transformer(data.train, on_gpu=on_gpu)
    vocabulary = _up(data.vocabulary, 64)
    text_seq_len = min(_up(data.longest_tokens, 8), 128)
    discriminator = data.train >= _FEW_FOR_A_DISCRIMINATOR
    views = 0 if data.train >= 100_000 else 14 if on_gpu else 6
    schedules = _schedules(data.train, on_gpu=on_gpu)
    cut = f"; {data.longest_tokens} would not all fit" if data.longest_tokens > 128 else ""
    reasons = {
        "held out": (
            f"{data.validation} of {data.train + data.validation} pairs",
            "never trained on, so that the report can say what was learnt",
        ),
        "background": (f"cut out, {data.ground} instead" if data.ground else "kept", data.background),
        "image size": (f"{image_size} x {image_size} pixels", size_reason),
        "image tokens": (f"{grid} x {grid}", f"one for {image_size // grid} x {image_size // grid} pixels"),
        "codebook": (f"{codebook} entries", codebook_reason),
        "perceptual loss": ("efficientnet-lite0", "trained features keep edges that a distance of pixels blurs"),
        "discriminator": (
            "yes" if discriminator else "no",
            "from half of the steps on, for sharper images"
            if discriminator
            else f"it would memorise fewer than {_FEW_FOR_A_DISCRIMINATOR:,} images",
        ),
        "vocabulary": (f"{vocabulary} entries", f"{data.captions:,} captions need {data.vocabulary:,}"),
        "text length": (f"{text_seq_len} tokens", f"the longest caption has {data.longest_tokens}{cut}"),
        "ranker": ("efficientnet-lite0", "starts from ImageNet, so that few images suffice"),
        "hard negatives": (
            f"{_HARD_NEGATIVES} captions an image" if data.states_facts else "none",
            "wrong in one fact each, which candidates are ranked by, too"
            if data.states_facts
            else "the captions state no facts of which one could be changed",
        ),
        "transformer": (f"{transformer.layers} layers of {transformer.dim}", transformer_reason),
        "transformer's options": _transformer_options(transformer, machine),
        "augmented views": (
            f"{views} an image" if views else "none",
            "shifted copies against memorising" if views else "enough images without copies",
        ),
        "mirroring": (
            "no" if data.mentions_sides else "yes",
            "captions say left or right" if data.mentions_sides else "no caption says left or right",
        ),
    }
    for stage, schedule in schedules.items():
        visits = schedule.steps * schedule.batch / data.train
        reasons[f"{stage} steps"] = (
            f"{schedule.steps:,} of {schedule.batch} images",
            f"each of the {data.train:,} images {visits:,.0f} times",
        )
    return Sizes(
        device=machine.device,
        gpus=max(1, machine.gpus),
        has_bf16=machine.has_bf16,
        image_size=image_size,
        levels=levels,
        base_channels=96 if on_gpu and image_size >= 256 else 64 if on_gpu else 32,
        codebook_size=codebook,
        discriminator=discriminator,
        text_vocab_size=vocabulary,
        text_seq_len=text_seq_len,
        transformer=transformer,
        large_ranker=on_gpu,
        hard_negative_captions=_HARD_NEGATIVES if data.states_facts else 0,
        augmented_views=views,
        flip=not data.mentions_sides,
        threads=machine.cores,
        split_fraction=data.split_fraction,
        split_seed=data.split_seed,
        schedules=schedules,
        reasons=reasons,
    )


def with_base(sizes: Sizes, base: Mapping[str, Any], name: str) -> Sizes:
    """The sizes for training on from a model: its own, half of the steps, and room for new words.

    Args:
        base: config.json of the model folder.
        name: of the folder, for the reasons.
    """
    vqgan, transformer = base["vqgan"], base["transformer"]
    vocabulary = max(sizes.text_vocab_size, transformer["text_vocab_size"])
    reasons = dict(sizes.reasons)
    changed = {
        "image size": f"{vqgan['image_size']} x {vqgan['image_size']} pixels",
        "image tokens": f"{transformer['image_grid_size']} x {transformer['image_grid_size']}",
        "codebook": f"{vqgan['codebook_size']} entries",
        "text length": f"{transformer['text_seq_len']} tokens",
        "transformer": f"{transformer['num_layers']} layers of {transformer['dim']}",
    }
    reasons |= {what: (value, f"as in {name}") for what, value in changed.items()}
    grown = vocabulary > transformer["text_vocab_size"]
    reason = "its own and the words that are new" if grown else f"as in {name}, which has room for the new words"
    reasons["vocabulary"] = (f"{vocabulary} entries", reason)
    if "koclip" not in base:
        reasons["ranker"] = (reasons["ranker"][0], f"{name} has none: trained from ImageNet weights")
    else:
        reasons["ranker"] = (base["koclip"].get("image_encoder", "efficientnet"), f"as in {name}")
    schedules = {}
    for stage, schedule in sizes.schedules.items():
        half = Schedule(max(1, schedule.steps // 2), schedule.batch)
        schedules[stage] = half
        reasons[f"{stage} steps"] = (f"{half.steps:,} of {half.batch} images", "half of what a new model would get")
    return replace(
        sizes,
        image_size=vqgan["image_size"],
        codebook_size=vqgan["codebook_size"],
        levels=tuple(vqgan["channel_multipliers"]),
        text_vocab_size=vocabulary,
        text_seq_len=transformer["text_seq_len"],
        schedules=schedules,
        reasons=reasons,
    )


def _image_size(data: DatasetFacts, machine: MachineFacts, minutes: float | None) -> tuple[int, str]:
    if machine.device == "cpu":
        if minutes is not None and minutes < SHORT_MINUTES:
            wanted, reason = 32, f"{minutes:g} minutes on a CPU are too few for 64"
        elif data.ground and data.train >= _FEW_FOR_A_DISCRIMINATOR and (minutes or 1e9) >= _LEAST_MINUTES_FOR_96:
            wanted, reason = 96, "cut-outs leave the tokens to the objects, so that a CPU can train it in hours"
        else:
            wanted, reason = 64, "what a CPU can train in hours"
    elif machine.memory_bytes < 20 * GIB:
        wanted, reason = 128, f"a GPU with {machine.memory_bytes / GIB:.0f} GiB"
    elif data.train < _FEW_FOR_A_DISCRIMINATOR:
        wanted, reason = 128, f"{data.train:,} images do not teach the details of 256"
    else:
        wanted, reason = 256, f"a GPU with {machine.memory_bytes / GIB:.0f} GiB"
    fits = [size for size in _LEVELS if size <= data.side]
    if data.side and (not fits or max(fits) < wanted):
        return max(fits, default=32), f"half of the images are no larger than {data.side}"
    return wanted, reason


def _codebook(train: int, grid: int, *, on_gpu: bool) -> tuple[int, str]:
    """The power of two nearest below one entry for 128 tokens of the training images, within bounds."""
    tokens = train * grid**2
    most = 16384 if on_gpu else 1024
    wanted = 1 << max(0, (tokens // 128).bit_length() - 1)
    size = min(max(wanted, 64), most)
    if wanted > most:
        return size, f"{tokens:,} tokens would fill more, which {'a GPU' if on_gpu else 'a CPU'} has no time for"
    return size, f"{tokens:,} tokens in the training images, at least 128 an entry" if wanted >= 64 else (
        f"the least: {tokens:,} tokens in the training images"
    )


def _transformer(train: int, *, on_gpu: bool) -> tuple[Transformer, str]:
    chosen = next(row for row in TRANSFORMERS if train <= row.most_pairs)
    if not on_gpu and chosen.dim > _LARGEST_ON_CPU:
        largest = next(row for row in reversed(TRANSFORMERS) if row.dim <= _LARGEST_ON_CPU)
        return largest, "the largest that a CPU can train"
    return chosen, f"for {train:,} pairs; a larger one would memorise them" if chosen.dim < 1024 else "as published"


def _transformer_options(transformer: Transformer, machine: MachineFacts) -> tuple[str, str]:
    if transformer.dim > _LARGEST_SMALL:
        return "as published", f"the others are tried up to a width of {_LARGEST_SMALL}"
    if machine.device != "cpu" and not machine.has_bf16:
        return "as published", "Muon needs bfloat16, which this GPU has not"
    return "qk_norm, zero_init_branches, x0_scalars, Muon", "what configs/clothing trains small models with"


def _schedules(train: int, *, on_gpu: bool) -> dict[str, Schedule]:
    """Passes over the images as in configs/clothing, with a floor below which no model learns anything.

    Batches are no larger than half of the training split: the ranker tells the captions of a batch apart.
    """
    half = max(2, train // 2)
    batches = {
        "vqgan": min(16 if on_gpu else 8, half),
        "koclip": min(128 if on_gpu else 48, half),
        "kodalle": min(64 if on_gpu else 32, half),
    }
    passes = {"vqgan": 20, "koclip": 12, "kodalle": 37}
    least = {"vqgan": 1500, "koclip": 300, "kodalle": 800}
    most = {"vqgan": 200_000, "koclip": 100_000, "kodalle": 300_000}
    return {
        stage: Schedule(min(max(passes[stage] * train // batches[stage], least[stage]), most[stage]), batches[stage])
        for stage in STAGES
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
