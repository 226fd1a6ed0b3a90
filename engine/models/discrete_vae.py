"""DALLE-pytorch's DiscreteVAE: strided convolutions, argmax codes, strided transposed convolutions.

State-dict names are the original's (`encoder.{i}.…`, `decoder.{i}.…`, `codebook.weight`). Trained with Gumbel noise there;
here it only encodes and decodes, so the code of a position is the argmax. Nothing clamps or unnormalises the original's
reconstructions; here they are images in [0, 1] as everywhere. Where it has a fourth channel, alpha, RGB images are encoded
as opaque ones, and decoded ones are laid over white.

```
images [0,1] -> normalised -> encoder -> argmax -> codebook -> decoder -> [0,1]
 (B,C,S,S)                   (B,K,h,w)  (B,N)     (B,E,h,w)   (B,C,S,S)
```

Shapes: B images, C image_channels, S pixels, K codes, E embed_dim, h = w = S / 2**num_layers, N = h*w.
Source: lucidrains/DALLE-pytorch `DiscreteVAE`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.codec import DiscreteVaeConfig
from engine.models.image_tokens import check_images, likeliest_codes, token_grid


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a 1x1 one beside the identity: (B, C, h, w) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            _convolution(channels, channels, 3), nn.ReLU(), _convolution(channels, channels, 3), nn.ReLU(),
            _convolution(channels, channels, 1),
        )  # fmt: skip

    def forward(self, stream: Tensor) -> Tensor:
        return self.net(stream) + stream


class DiscreteVae(nn.Module):
    """Encoder, codebook, decoder; an `engine.models.image_codec.ImageCodec`."""

    def __init__(self, config: DiscreteVaeConfig) -> None:
        super().__init__()
        self.config = config
        C, hidden, blocks = config.image_channels, config.hidden_channels, config.num_res_blocks
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        decoder_input = config.embed_dim
        if blocks:
            decoder += [_convolution(config.embed_dim, hidden, 1), *(ResidualBlock(hidden) for _ in range(blocks))]
            decoder_input = hidden
        for level in range(config.num_layers):
            down = nn.Conv2d(hidden if level else C, hidden, 4, stride=2, padding=1, dtype=torch.float32)
            up_input = hidden if level else decoder_input
            up = nn.ConvTranspose2d(up_input, hidden, 4, stride=2, padding=1, dtype=torch.float32)
            encoder.append(nn.Sequential(down, nn.ReLU()))
            decoder.append(nn.Sequential(up, nn.ReLU()))
        encoder += [*(ResidualBlock(hidden) for _ in range(blocks)), _convolution(hidden, config.codebook_size, 1)]
        decoder.append(_convolution(hidden, C, 1))
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.codebook = nn.Embedding(config.codebook_size, config.embed_dim, dtype=torch.float32)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens: (B, 3 or C, S, S) in [0, 1] -> (B, N) int64.

        Raises:
            ValueError: wrong shape or type.
        """
        return likeliest_codes(self.encode_logits(images))

    def encode_logits(self, images: Tensor) -> Tensor:
        """Scores of the codes: (B, 3 or C, S, S) in [0, 1] -> (B, K, h, w). Same errors."""
        if self.config.image_channels == 4 and images.dim() == 4 and images.shape[1] == 3:
            images = F.pad(images, (0, 0, 0, 0, 0, 1), value=1.0)
        check_images(images, channels=self.config.image_channels, size=self.config.image_size)
        mean, deviation = self._normalisation(images)
        return self.encoder(((images - mean) / deviation).to(self.codebook.weight.dtype))

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Tokens to images: (B, N) integers -> (B, 3, S, S) float in [0, 1].

        Raises:
            ValueError: wrong shape, or a token outside the codebook.
        """
        return _over_white(self.decode_channels(image_tokens))

    @torch.no_grad()
    def decode_channels(self, image_tokens: Tensor) -> Tensor:
        """Tokens to images with their alpha: (B, N) integers -> (B, C, S, S) float in [0, 1]. Same errors."""
        return self._unnormalised(self.decoder(token_grid(image_tokens, self.codebook.weight, self.config)))

    def code_vectors(self) -> Tensor:
        """(K, E)."""
        return self.codebook.weight.detach()

    def latent_table(self) -> Tensor:
        """(K, E)."""
        return self.codebook.weight.detach().float()

    def to_images(self, decoded: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, 3, S, S) float32 in [0, 1]."""
        return _over_white(self._unnormalised(decoded))

    def _unnormalised(self, decoded: Tensor) -> Tensor:
        """(B, C, S, S) normalised -> (B, C, S, S) float32 in [0, 1]."""
        mean, deviation = self._normalisation(decoded)
        return (decoded.float() * deviation + mean).clamp(0.0, 1.0)

    def _normalisation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, (C, 1, 1); alpha, the fourth, is not normalised."""
        means, deviations = (0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)
        C = self.config.image_channels
        mean, deviation = (
            torch.tensor(values[:C], dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for values in (means, deviations)
        )
        return mean, deviation


def _over_white(images: Tensor) -> Tensor:
    """(B, 3 or 4, S, S) -> (B, 3, S, S)."""
    if images.shape[1] == 3:
        return images
    colours, alpha = images[:, :3], images[:, 3:]
    return colours * alpha + (1 - alpha)


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, dtype=torch.float32)
