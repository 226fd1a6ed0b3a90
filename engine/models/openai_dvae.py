"""OpenAI's dVAE: the codec of the DALL-E paper, 8,192 codes on a grid of an eighth of the image's size.

State-dict names are the original's (`blocks.group_1.block_1.res_path.conv_1.w`) below `encoder.` and `decoder.`. The code of a
position is the argmax, without noise. In training the decoder reads mixtures of codes instead (`engine.models.dvae_loss`).

```
images [0,1] -> 0.8x+0.1 -> encoder -> argmax -> decoder -> sigmoid of three maps -> (x-0.1)/0.8, clamped
 (B,3,S,S)                 (B,K,h,w)   (B,N)    (B,6,S,S)
```

The other three of the six maps are the logarithms of the logit-Laplace distribution's scales, which reconstructions do not use.
The decoder's first layer, a 1x1 convolution of the one-hot code, is a table (`latent_table`). It and the encoder's last layer compute
in float32 whatever the weights' type is, as the original's do on GPUs.

Shapes: B images, S pixels, K codes, Z decoder_channels, h = w = S / 8, N = h*w.
Source: Ramesh et al. 2021, arXiv:2102.12092, appendix A; openai/DALL-E `dall_e`.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.codec import OpenaiDvaeConfig
from engine.models.image_tokens import check_images, likeliest_codes, token_grid

LOGIT_LAPLACE_EPS = 0.1
NUM_GROUPS = 4


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], where the logit is finite."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


class Convolution(nn.Module):
    """A same-size convolution with the original's parameter names, `w` and `b`.

    Args:
        in_float32: compute so, and return float32, whatever the type of the weights; else in the weights' type.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, in_float32: bool = False) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.in_float32 = in_float32
        shape = (out_channels, in_channels, kernel, kernel)
        deviation = 1 / math.sqrt(in_channels * kernel**2)
        self.w = nn.Parameter(torch.empty(shape, dtype=torch.float32).normal_(std=deviation))
        self.b = nn.Parameter(torch.zeros(out_channels, dtype=torch.float32))

    def forward(self, stream: Tensor) -> Tensor:
        dtype = torch.float32 if self.in_float32 else self.w.dtype
        return F.conv2d(stream.to(dtype), self.w.to(dtype), self.b.to(dtype), padding=self.padding)


class Block(nn.Module):
    """A bottleneck beside the identity, its output scaled by 1 / blocks**2: (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernels: tuple[int, int, int, int], *, gain: float) -> None:
        super().__init__()
        self.gain = gain
        inner = out_channels // 4
        widths = (in_channels, inner, inner, inner, out_channels)
        self.id_path = nn.Identity() if in_channels == out_channels else Convolution(in_channels, out_channels, 1)
        layers: list[tuple[str, nn.Module]] = []
        for number, kernel in enumerate(kernels, start=1):
            layers += [
                (f"relu_{number}", nn.ReLU()),
                (f"conv_{number}", Convolution(widths[number - 1], widths[number], kernel)),
            ]
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, stream: Tensor) -> Tensor:
        return self.id_path(stream) + self.gain * self.res_path(stream)


class _Network(nn.Module):
    """Input convolution, four groups with a change of size after the first three, output convolution."""

    def __init__(self, *, entry: Convolution, widths: tuple[int, ...], kernels: tuple[int, int, int, int],
                 blocks_per_group: int, resize: nn.Module, output: Convolution) -> None:  # fmt: skip
        super().__init__()
        gain = 1 / (NUM_GROUPS * blocks_per_group) ** 2
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=entry)
        for group in range(NUM_GROUPS):
            channels = (widths[group], *(widths[group + 1] for _ in range(blocks_per_group)))
            layers: list[tuple[str, nn.Module]] = [
                (f"block_{i + 1}", Block(channels[i], channels[i + 1], kernels, gain=gain))
                for i in range(blocks_per_group)
            ]
            if group < NUM_GROUPS - 1:
                layers.append(("resize", resize))  # has no parameters
            parts[f"group_{group + 1}"] = nn.Sequential(OrderedDict(layers))
        parts["output"] = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", output)]))
        self.blocks = nn.ModuleDict(parts)

    def after_input(self, stream: Tensor) -> Tensor:
        """Everything behind the input convolution."""
        for name, part in self.blocks.items():
            stream = stream if name == "input" else part(stream)
        return stream


class Encoder(_Network):
    """(B, 3, S, S) mapped pixels -> (B, K, h, w) scores of the codes."""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.after_input(self.blocks["input"](pixels))


class Decoder(_Network):
    """(B, Z, h, w) rows of the table -> (B, 6, S, S) maps."""

    def forward(self, latents: Tensor) -> Tensor:
        return self.after_input(latents)


class OpenaiDvae(nn.Module):
    """Encoder and decoder; an `engine.models.image_codec.ImageCodec`."""

    def __init__(self, config: OpenaiDvaeConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_channels
        self.encoder = Encoder(
            entry=Convolution(3, hidden, 7), widths=(hidden, hidden, 2 * hidden, 4 * hidden, 8 * hidden),
            kernels=(3, 3, 3, 1), blocks_per_group=config.blocks_per_group, resize=nn.MaxPool2d(2),
            output=Convolution(8 * hidden, config.codebook_size, 1, in_float32=True),
        )  # fmt: skip
        self.decoder = Decoder(
            entry=Convolution(config.codebook_size, config.decoder_channels, 1, in_float32=True),
            widths=(config.decoder_channels, 8 * hidden, 4 * hidden, 2 * hidden, hidden),
            kernels=(1, 3, 3, 3), blocks_per_group=config.blocks_per_group,
            resize=nn.Upsample(scale_factor=2, mode="nearest"), output=Convolution(hidden, 6, 1),
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens: (B, 3, S, S) in [0, 1] -> (B, N) int64.

        Raises:
            ValueError: wrong shape or type.
        """
        return likeliest_codes(self.encode_logits(images))

    def encode_logits(self, images: Tensor) -> Tensor:
        """Scores of the codes: (B, 3, S, S) in [0, 1] -> (B, K, h, w). Same errors."""
        check_images(images, channels=3, size=self.config.image_size)
        return self.encoder(map_pixels(images))

    def decode_mixtures(self, codes: Tensor) -> Tensor:
        """The six maps of mixtures of codes: (B, K, h, w) float, each position's sum 1 -> (B, 6, S, S)."""
        latents = self._entry(codes)
        return self.decoder(latents.to(self._entry.w.dtype))

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Tokens to images: (B, N) integers -> (B, 3, S, S) float in [0, 1].

        Raises:
            ValueError: wrong shape, or a token outside the codebook.
        """
        table = self.latent_table().to(self._entry.w.dtype)
        return self.to_images(self.decoder(token_grid(image_tokens, table, self.config)))

    def code_vectors(self) -> Tensor:
        """(K, Z): the decoder reads no others."""
        return self.latent_table()

    @torch.no_grad()
    def latent_table(self) -> Tensor:
        """(K, Z): the decoder's first convolution at each one-hot code."""
        return self._entry.w[:, :, 0, 0].T.float() + self._entry.b.float()

    def to_images(self, decoded: Tensor) -> Tensor:
        """(B, 6, S, S) maps -> (B, 3, S, S) float32 in [0, 1]."""
        pixels = torch.sigmoid(decoded[:, :3].float())
        return ((pixels - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0.0, 1.0)

    @property
    def _entry(self) -> Convolution:
        entry = self.decoder.blocks["input"]
        assert isinstance(entry, Convolution)
        return entry
