"""AttnGAN trained on pairs for so many minutes of a processor, and what it generates.

As published, the text encoder and the matching model (DAMSM) come first, the generator and its discriminators stand on them:

    matching   text encoder, and projections of EfficientNet-Lite0's features of the training images, which are computed once
    gan        generator and two discriminators; both encoders are frozen. What generates is the generator's moving average

A step's batch and noise are a function of seed and step. `matching.safetensors` and `gan.pt`, written every few minutes, make a run go on
after an interruption; `model.safetensors` is its end, `training.json` what it took.

Shapes: N training images, B a batch, T words.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines.attngan_losses import (
    MATCHING_WEIGHT,
    damsm_loss,
    discriminator_loss,
    generator_loss,
    sentence_similarities,
    word_similarities,
)
from baselines.attngan_networks import (
    STAGE_SIZES,
    Discriminator,
    Generator,
    ImageEncoder,
    TextEncoder,
    lite0_features,
)
from engine.data.pairs import Pair, load_image
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.device import cpu_capabilities
from engine.files import atomic_file, read_json, write_json
from engine.models.efficientnet_lite0 import load_efficientnet_lite0
from engine.pipeline.image_files import to_uint8

MATCHING_SHARE = 0.15  # of the minutes
MATCHING_BATCH, GAN_BATCH = 48, 16
_MATCHING_RATE, _RATE_DECAY, _LEAST_RATE, _LSTM_CLIP = 2e-3, 0.98, 2e-4, 0.25
_GAN_RATE, _BETAS, _AVERAGE = 2e-4, (0.5, 0.999), 0.999
_CHECKPOINT_S = 120.0
_ENCODE_AT_ONCE = 32
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainingSet:
    """N images with their captions.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        tokens: (N, T) int64, words alone, pads behind them.
        captions: (N,) int64, equal numbers for equal captions.
    """

    images: Tensor
    tokens: Tensor
    captions: Tensor


class AttnGan(nn.Module):
    """Encoders and generator.

    Args:
        tokenizer: of captions.
        text_length: words that a caption may have, T.
        channels: of the generator.
    """

    def __init__(self, tokenizer: CaptionTokenizer, text_length: int, *, channels: int = 24) -> None:
        super().__init__()
        self.tokenizer, self.text_length = tokenizer, text_length
        self.text = TextEncoder(tokenizer.num_rows, tokenizer.pad_id)
        self.image = ImageEncoder()
        self.generator = Generator(channels=channels)
        self.lite0 = [load_efficientnet_lite0(field="AttnGAN").requires_grad_(False)]  # no part of what is saved

    @torch.no_grad()
    def generate(self, captions: Sequence[str], *, seed: int) -> Tensor:
        """One image of each caption, (B, 64, 64, 3) uint8; equal for equal seeds and captions."""
        self.eval()
        noise = torch.randn(
            len(captions), self.generator.noise, generator=_random(seed, 0), dtype=torch.float32, device="cpu"
        )
        augmentation = torch.randn(
            len(captions), self.condition, generator=_random(seed, 1), dtype=torch.float32, device="cpu"
        )
        text = self.text(words_of(self.tokenizer, captions, self.text_length))
        images, _ = self.generator(noise, text, augmentation)
        return to_uint8((images[-1] + 1) / 2)

    @property
    def condition(self) -> int:
        """Width of the augmented caption."""
        layer = self.generator.condition[0]
        assert isinstance(layer, nn.Linear)
        return layer.out_features // 4

    @torch.no_grad()
    def scores(self, caption: str, images: Tensor) -> list[float]:
        """How well images (B, 64, 64, 3) uint8 match a caption, by the matching model: what ranks candidates."""
        self.eval()
        text = self.text(words_of(self.tokenizer, [caption], self.text_length))
        regions, whole = self.image(*lite0_features(self.lite0[0], _signed(images.permute(0, 3, 1, 2))))
        by_words = word_similarities(regions, text.words, text.mask)
        found: list[float] = (by_words + sentence_similarities(whole, text.sentence))[:, 0].tolist()
        return found


def words_of(tokenizer: CaptionTokenizer, captions: Sequence[str], length: int) -> Tensor:
    """Tokens (B, T) of words alone: without [CLS] and [SEP], pads behind; a caption without a word has one unknown one."""
    rows = tokenizer.encode(captions, length + 2).tokens
    skipped = {tokenizer.pad_id, *tokenizer.end_ids, int(tokenizer.empty(2)[0, 0])}
    unknown = next(iter(sorted(tokenizer.special_ids - skipped)))
    words = [[token for token in row if token not in skipped][:length] or [unknown] for row in rows.tolist()]
    padded = [row + [tokenizer.pad_id] * (length - len(row)) for row in words]
    return torch.tensor(padded, dtype=torch.int64, device="cpu")


def training_set(pairs: Sequence[Pair], tokenizer: CaptionTokenizer, text_length: int) -> TrainingSet:
    """Pairs in memory, at the second stage's size, with their first captions."""
    size = STAGE_SIZES[-1]
    images = np.stack([load_image(pair, size) for pair in pairs])
    captions = [pair.captions[0] for pair in pairs]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return TrainingSet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        words_of(tokenizer, captions, text_length),
        torch.tensor([numbers[caption] for caption in captions], dtype=torch.int64, device="cpu"),
    )


def train_attngan(
    run: Path, pairs: Sequence[Pair], *, minutes: float, seed: int = 1, channels: int = 24, text_length: int = 30
) -> tuple[AttnGan, dict[str, Any]]:
    """An AttnGAN after `minutes` of processor time of one thread, and what its training took.

    Loading the images counts, as every computation does; a part that was lost by an interruption does not. One that has ended is
    read again; for more minutes than it took, its second part goes on.
    """
    spent = _Spent(0.0)
    run.mkdir(parents=True, exist_ok=True)
    captions = [caption for pair in pairs for caption in pair.captions]
    torch.manual_seed(seed)  # weights start by the global generator
    model = AttnGan(train_tokenizer(captions, vocab_size=256), text_length, channels=channels)
    if (run / "training.json").is_file():
        record = dict(read_json(run / "training.json", field="run", remedy="remove it"))
        if record["processor_minutes"] >= minutes:
            model.load_state_dict(load_file(run / "model.safetensors"))
            return model, record
    data = training_set(pairs, model.tokenizer, text_length)
    matching_s = 60 * minutes * MATCHING_SHARE
    matching = _matching(run, model, data, spent, seconds=matching_s, seed=seed)
    gan = _gan(run, model, data, spent, seconds=60 * minutes, seed=seed)
    record = {
        "processor_minutes": spent.seconds / 60, "matching": matching, "gan": gan, "images": len(pairs),
        "parameters": {
            name: sum(weight.numel() for weight in getattr(model, name).parameters())
            for name in ("text", "image", "generator")
        },
        "bfloat16": _is_bfloat16(),
    }  # fmt: skip
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run / "model.safetensors")
    write_json(run / "training.json", record)
    return model, record


@dataclass
class _Spent:
    """Processor seconds of this process and of those before it that it goes on from."""

    before: float
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.process_time()

    @property
    def seconds(self) -> float:
        return self.before + time.process_time() - self.started


def _matching(
    run: Path, model: AttnGan, data: TrainingSet, spent: _Spent, *, seconds: float, seed: int
) -> dict[str, Any]:
    """Trains text encoder and projections until `seconds` are spent; at least one step."""
    stored, record_path = run / "matching.safetensors", run / "matching.json"
    parts = nn.ModuleDict({"text": model.text, "image": model.image})
    if record_path.is_file():
        parts.load_state_dict(load_file(stored))
        record = dict(read_json(record_path, field="run", remedy="remove it"))
        spent.before += record["processor_s"] - (time.process_time() - spent.started)  # loading was counted then
        return record
    regions, pooled = _encoded(model, data.images)
    model.image.standardise(regions, pooled)
    parts.train()
    optimizer = torch.optim.Adam(parts.parameters(), lr=_MATCHING_RATE, betas=_BETAS)
    steps_an_epoch = max(1, len(data.images) // MATCHING_BATCH)
    step, loss = 0, 0.0
    while step == 0 or spent.seconds < seconds:
        for group in optimizer.param_groups:
            group["lr"] = max(_LEAST_RATE, _MATCHING_RATE * _RATE_DECAY ** (step // steps_an_epoch))
        batch = _batch(len(data.images), MATCHING_BATCH, seed, step)
        encoded = model.image(regions[batch], pooled[batch])
        found = damsm_loss(encoded, model.text(data.tokens[batch]), data.captions[batch])
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        nn.utils.clip_grad_norm_(model.text.lstm.parameters(), _LSTM_CLIP)
        optimizer.step()
        loss, step = 0.9 * loss + 0.1 * float(found.detach()), step + 1
    record = {"steps": step, "loss": loss / (1 - 0.9**step), "processor_s": spent.seconds}
    save_file({name: value.contiguous() for name, value in parts.state_dict().items()}, stored)
    write_json(record_path, record)
    return record


@torch.no_grad()
def _encoded(model: AttnGan, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 36, 1552) float16 and (N, 2944) float32 features of the training images."""
    found = [lite0_features(model.lite0[0], _signed(part)) for part in images.split(_ENCODE_AT_ONCE)]
    return torch.cat([regions.half() for regions, _ in found]), torch.cat([pooled for _, pooled in found])


def _gan(run: Path, model: AttnGan, data: TrainingSet, spent: _Spent, *, seconds: float, seed: int) -> dict[str, Any]:
    """Trains generator and discriminators until `seconds` are spent; at least one step. The model gets the average."""
    gan = _Gan(model, seed)
    checkpoint = run / "gan.pt"
    if checkpoint.is_file():
        spent.before, spent.started = gan.restore(checkpoint), time.process_time()
    saved_s = spent.seconds
    while gan.step == 0 or spent.seconds < seconds:
        gan.train_step(data)
        if spent.seconds - saved_s > _CHECKPOINT_S:
            saved_s = spent.seconds
            gan.save(checkpoint, saved_s)
            print(f"AttnGAN, step {gan.step}, {saved_s / 60:.1f} minutes: {gan.losses_text()}", flush=True)
    gan.save(checkpoint, spent.seconds)
    model.generator.load_state_dict(gan.average.state_dict())
    return {"steps": gan.step, "batch": GAN_BATCH, "losses": gan.losses}


class _Gan:
    """Networks, optimizers and losses of the adversarial training."""

    def __init__(self, model: AttnGan, seed: int) -> None:
        self.model, self.seed, self.step = model, seed, 0
        model.text.requires_grad_(False).eval()
        model.image.requires_grad_(False).eval()
        self.average = copy.deepcopy(model.generator).requires_grad_(False)
        self.discriminators = nn.ModuleList(Discriminator(size) for size in STAGE_SIZES)
        self.generator_optimizer = _adam(model.generator)
        self.discriminator_optimizers = [_adam(network) for network in self.discriminators]
        self.losses: dict[str, float] = {}

    def train_step(self, data: TrainingSet) -> None:
        """One step of each discriminator, then one of the generator."""
        model, generator = self.model, self.model.generator
        generator.train()
        chance = _random(self.seed, self.step + 1)
        batch = _batch(len(data.images), GAN_BATCH, self.seed, self.step)
        count = len(batch)
        noise, augmentation = (
            torch.randn(count, width, generator=chance, dtype=torch.float32, device="cpu")
            for width in (generator.noise, model.condition)
        )
        real = _signed(data.images[batch])
        mirrored = torch.rand(count, generator=chance, dtype=torch.float32, device="cpu") < 0.5
        real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        reals = [real if size == real.shape[2] else F.interpolate(real, size, mode="area") for size in STAGE_SIZES]
        with torch.no_grad():
            text = model.text(data.tokens[batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=_is_bfloat16()):
            generated, divergence = generator(noise, text, augmentation)
        for number, network in enumerate(self.discriminators):
            assert isinstance(network, Discriminator)
            network.requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=_is_bfloat16()):
                loss = discriminator_loss(network, reals[number], generated[number], text.sentence)
            _minimise(loss, self.discriminator_optimizers[number])
            network.requires_grad_(False)
            self._log(f"discriminator_{STAGE_SIZES[number]}", loss)
        adversarial = []
        with torch.autocast("cpu", torch.bfloat16, enabled=_is_bfloat16()):
            for network, images in zip(self.discriminators, generated, strict=True):
                assert isinstance(network, Discriminator)
                adversarial.append(generator_loss(network, images, text.sentence))
            features = lite0_features(model.lite0[0], generated[-1])
        matching = damsm_loss(model.image(*features), text, data.captions[batch])
        _minimise(sum(adversarial) + MATCHING_WEIGHT * matching + divergence, self.generator_optimizer)
        self._log("generator", torch.stack(adversarial).detach().sum())
        self._log("matching", matching)
        self._update_average()
        self.step += 1

    def _update_average(self) -> None:
        """Weights as a moving average; the norms' statistics, averages already, as they are."""
        rate = min(_AVERAGE, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, weight in zip(self.average.parameters(), self.model.generator.parameters(), strict=True):
                kept.lerp_(weight, 1 - rate)
            for statistic, value in zip(self.average.buffers(), self.model.generator.buffers(), strict=True):
                statistic.copy_(value)

    def _log(self, name: str, loss: Tensor) -> None:
        value = float(loss.detach())
        self.losses[name] = 0.98 * self.losses.get(name, value) + 0.02 * value

    def losses_text(self) -> str:
        """Averages of the last steps, for people."""
        return ", ".join(f"{name} {value:.2f}" for name, value in self.losses.items())

    def _parts(self) -> dict[str, Any]:
        optimizers = dict(enumerate(self.discriminator_optimizers))
        return {
            "generator": self.model.generator, "average": self.average, "discriminators": self.discriminators,
            "generator_optimizer": self.generator_optimizer,
        } | {f"optimizer_{number}": optimizer for number, optimizer in optimizers.items()}  # fmt: skip

    def save(self, path: Path, seconds: float) -> None:
        """Writes everything that the next step needs."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        with atomic_file(path) as temporary:
            torch.save(state | {"step": self.step, "seconds": seconds, "losses": self.losses}, temporary)

    def restore(self, path: Path) -> float:
        """Reads a checkpoint; the processor seconds that were spent until then."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.losses = state["step"], state["losses"]
        return float(state["seconds"])


def _adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=_GAN_RATE, betas=_BETAS)


def _minimise(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _batch(count: int, size: int, seed: int, step: int) -> Tensor:
    """(B,) numbers of training images of a step, none twice."""
    return torch.randperm(count, generator=_random(seed, step), dtype=torch.int64, device="cpu")[:size]


def _random(seed: int, step: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + step)


def _signed(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _is_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, as in the pipeline's own training."""
    return cpu_capabilities().multiplies_bfloat16
