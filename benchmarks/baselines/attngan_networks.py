"""AttnGAN's networks (arXiv 1711.10485) at a small size: two stages of 32 and 64 pixels.

As the paper and its code have them: a bidirectional LSTM over the caption's words; conditioning augmentation; a first stage from noise and the
caption; a second one, whose positions attend over the words; a discriminator a stage, with and without the caption. What differs:
stages of 32 and 64 pixels in the place of 64, 128 and 256, fewer channels, and EfficientNet-Lite0 in the place of Inception-v3 as the
frozen half of the image encoder, whose features are standardised.

Shapes: B images, T words, P regions of an image, E width of the shared space, G channels of the generator, Z noise, S pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from engine.models.efficientnet_lite0 import EfficientNetLite0

STAGE_SIZES = (32, 64)
ENCODED_SIZE = 96  # pixels that the image encoder sees
NUM_REGION_FEATURES, NUM_IMAGE_FEATURES = 1552, 2944  # of EfficientNet-Lite0's cells and pooled features
_FIRST_GRID = 4
_EMBEDDING_RANGE = 0.1
_SLOPE = 0.2


class Words(NamedTuple):
    """B encoded captions."""

    words: Tensor
    """(B, T, E)."""
    sentence: Tensor
    """(B, E)."""
    mask: Tensor
    """(B, T) bool: True where there is a word."""


class TextEncoder(nn.Module):
    """Bidirectional LSTM: a vector a word, and the last states of both directions for the caption.

    Args:
        vocab_size: entries of the tokenizer.
        pad_id: token that is no word.
        width: E.
    """

    def __init__(self, vocab_size: int, pad_id: int, *, width: int = 256, embedding_dim: int = 300) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocab_size, embedding_dim, dtype=torch.float32)
        self.dropout = nn.Dropout(0.5)
        self.lstm = nn.LSTM(embedding_dim, width // 2, batch_first=True, bidirectional=True, dtype=torch.float32)
        nn.init.uniform_(self.embedding.weight, -_EMBEDDING_RANGE, _EMBEDDING_RANGE)

    def forward(self, tokens: Tensor) -> Words:
        """(B, T) int64, each with a word, pads behind the words -> encoded captions."""
        mask = tokens != self.pad_id
        packed = pack_padded_sequence(
            self.dropout(self.embedding(tokens)), mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, (last, _) = self.lstm(packed)
        words, _ = pad_packed_sequence(states, batch_first=True, total_length=tokens.shape[1])
        return Words(words, last.transpose(0, 1).flatten(1), mask)


class ImageEncoder(nn.Module):
    """Projections of frozen features into the space of the words; `lite0_features` gives the features.

    `standardise` sets mean and scale of both kinds of features, of the training images.
    """

    region_mean: Tensor
    region_scale: Tensor
    image_mean: Tensor
    image_scale: Tensor

    def __init__(self, *, width: int = 256) -> None:
        super().__init__()
        self.regions = nn.Linear(NUM_REGION_FEATURES, width, bias=False, dtype=torch.float32)
        self.image = nn.Linear(NUM_IMAGE_FEATURES, width, dtype=torch.float32)
        for name, size in (("region", NUM_REGION_FEATURES), ("image", NUM_IMAGE_FEATURES)):
            self.register_buffer(f"{name}_mean", torch.zeros(size, dtype=torch.float32, device="cpu"))
            self.register_buffer(f"{name}_scale", torch.ones(size, dtype=torch.float32, device="cpu"))

    def standardise(self, regions: Tensor, pooled: Tensor) -> None:
        """Takes mean and deviation of (N, P, 1552) and (N, 2944) features."""
        for name, values in (("region", regions.flatten(0, 1)), ("image", pooled)):
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0, dtype=torch.float32))
            getattr(self, f"{name}_scale").copy_(values.float().std(dim=0).clamp(min=1e-3))

    def forward(self, regions: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Features of B images -> (B, P, E) regions and (B, E) images."""
        of_regions: Tensor = self.regions((regions.float() - self.region_mean) / self.region_scale)
        of_image: Tensor = self.image((pooled.float() - self.image_mean) / self.image_scale)
        return of_regions, of_image


def lite0_features(network: EfficientNetLite0, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) in [-1, 1] -> (B, 36, 1552) and (B, 2944); gradients flow into the images."""
    size = (ENCODED_SIZE, ENCODED_SIZE)
    found = network.features(F.interpolate((images + 1) / 2, size, mode="bilinear", align_corners=False))
    return found.cells(), found.pooled()


class WordAttention(nn.Module):
    """What each position of an image sees of the caption: words weighted by their product with the position."""

    def __init__(self, channels: int, *, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, channels, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attends.

        Args:
            hidden: (B, G, h, w).
            words: (B, T, E).
            mask: (B, T) bool.

        Returns:
            (B, G, h, w) and the weights (B, h * w, T), 0 where there is no word.
        """
        keys = self.project(words)  # (B, T, G)
        scores = hidden.flatten(2).transpose(1, 2) @ keys.transpose(1, 2)
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=2)
        return (weights @ keys).transpose(1, 2).reshape(hidden.shape), weights


class Generator(nn.Module):
    """Images of both stages from noise and captions.

    Args:
        width: E.
        channels: G.
        noise: Z.
        condition: width of the augmented caption.
    """

    def __init__(self, *, width: int = 256, channels: int = 32, noise: int = 100, condition: int = 100) -> None:
        super().__init__()
        self.noise = noise
        self.condition = nn.Sequential(nn.Linear(width, 4 * condition, dtype=torch.float32), nn.GLU(dim=1))
        first = 8 * channels
        self.start = nn.Sequential(
            nn.Linear(noise + condition, 2 * first * _FIRST_GRID**2, bias=False, dtype=torch.float32),
            nn.BatchNorm1d(2 * first * _FIRST_GRID**2, dtype=torch.float32),
            nn.GLU(dim=1),
        )
        self.grow = nn.Sequential(*(_up(first >> number, first >> (number + 1)) for number in range(3)))
        self.attention = WordAttention(channels, width=width)
        self.refine = nn.Sequential(_Residual(2 * channels), _Residual(2 * channels), _up(2 * channels, channels))
        self.to_images = nn.ModuleList(_conv3(channels, 3) for _ in STAGE_SIZES)

    def forward(self, noise: Tensor, captions: Words, augmentation: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Generates.

        Args:
            noise: (B, Z), standard normal.
            augmentation: (B, condition), standard normal; None: the mean of each caption's conditions.

        Returns:
            images in [-1, 1] of each stage, (B, 3, 32, 32) and (B, 3, 64, 64), and the divergence of the conditions from a
            standard normal, averaged over their numbers.
        """
        mean, log_variance = self.condition(captions.sentence).chunk(2, dim=1)
        condition = mean if augmentation is None else mean + augmentation * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        x = self.start(torch.cat([condition, noise], dim=1))
        hidden = self.grow(x.view(len(x), -1, _FIRST_GRID, _FIRST_GRID))
        seen, _ = self.attention(hidden, captions.words, captions.mask)
        refined = self.refine(torch.cat([hidden, seen.to(hidden.dtype)], dim=1))
        stages = zip(self.to_images, (hidden, refined), strict=True)
        return [to_image(x).float().tanh() for to_image, x in stages], divergence


class Discriminator(nn.Module):
    """Logits that an image of one stage is real, and that it is real and its caption's.

    Args:
        size: S.
        width: E.
        channels: of the first layer.
    """

    def __init__(self, size: int, *, width: int = 256, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [_down(3, channels, norm=False)]
        while size > 2 * _FIRST_GRID:
            layers.append(_down(channels, 2 * channels, norm=True))
            size, channels = size // 2, 2 * channels
        self.encode = nn.Sequential(*layers)
        self.joint = nn.Sequential(
            _conv3(channels + width, channels), nn.BatchNorm2d(channels, dtype=torch.float32), nn.LeakyReLU(_SLOPE)
        )
        self.alone = nn.Conv2d(channels, 1, _FIRST_GRID, dtype=torch.float32)
        self.conditional = nn.Conv2d(channels, 1, _FIRST_GRID, dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> features (B, C, 4, 4)."""
        features: Tensor = self.encode(images)
        return features

    def logits(self, features: Tensor, sentences: Tensor) -> Tensor:
        """Features and captions (B, E) -> (B,) that they belong to each other and the image is real."""
        spread = sentences[:, :, None, None].expand(-1, -1, *features.shape[2:]).to(features.dtype)
        return self.conditional(self.joint(torch.cat([features, spread], dim=1))).flatten().float()

    def unconditional_logits(self, features: Tensor) -> Tensor:
        """Features -> (B,) that the image is real."""
        return self.alone(features).flatten().float()


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv3(channels, 2 * channels), nn.BatchNorm2d(2 * channels, dtype=torch.float32), nn.GLU(dim=1),
            _conv3(channels, channels), nn.BatchNorm2d(channels, dtype=torch.float32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def _up(inside: int, out: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        _conv3(inside, 2 * out),
        nn.BatchNorm2d(2 * out, dtype=torch.float32),
        nn.GLU(dim=1),
    )


def _down(inside: int, out: int, *, norm: bool) -> nn.Sequential:
    """Half the size."""
    layers: list[nn.Module] = [nn.Conv2d(inside, out, 4, 2, 1, bias=False, dtype=torch.float32)]
    layers += [nn.BatchNorm2d(out, dtype=torch.float32)] if norm else []
    return nn.Sequential(*layers, nn.LeakyReLU(_SLOPE))


def _conv3(inside: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, padding=1, bias=False, dtype=torch.float32)
