"""taming's GumbelVQ: a VQGAN whose encoder scores the codes instead of coming near one.

The networks are those of `engine.models.vqgan`; state-dict names are the original's (`quantize.proj.*`,
`quantize.embed.weight`). The original adds Gumbel noise in eval too, so that 9 codes of 10 differ from call to call; here the
code of a position is the argmax of the scores, without noise. For imported checkpoints; it is not trained here.

Shapes: B images, S image_size in pixels, N = h*w positions, K codebook_size, E embed_dim, Z latent_channels (= E in taming).
Source: CompVis/taming-transformers `GumbelVQ`, `GumbelQuantize`.
"""

import torch
from torch import Tensor, nn

from engine.config.codec import VqganConfig
from engine.models.image_tokens import check_images, likeliest_codes, token_grid
from engine.models.vqgan import build_networks, joint_latent_table, to_signed_range, to_unit_range


class GumbelQuantizer(nn.Module):
    """Scores of the codes by a 1x1 convolution, and their entries: (B, E, h, w) -> (B, K, h, w)."""

    def __init__(self, codebook_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dim, codebook_size, kernel_size=1, dtype=torch.float32)
        self.embed = nn.Embedding(codebook_size, embed_dim, dtype=torch.float32)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents)


class GumbelVqgan(nn.Module):
    """Encoder, scores, codebook, decoder; an `engine.models.image_codec.ImageCodec`."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_networks(config)
        self.quantize = GumbelQuantizer(config.codebook_size, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, kernel_size=1, dtype=torch.float32)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1, dtype=torch.float32)

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
        signed = to_signed_range(images).to(self.quant_conv.weight.dtype)
        return self.quantize(self.quant_conv(self.encoder(signed)))

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Tokens to images: (B, N) integers -> (B, 3, S, S) float in [0, 1].

        Raises:
            ValueError: wrong shape, or a token outside the codebook.
        """
        latents = token_grid(image_tokens, self.quantize.embed.weight, self.config)
        return to_unit_range(self.decoder(self.post_quant_conv(latents)))

    def code_vectors(self) -> Tensor:
        """(K, E)."""
        return self.quantize.embed.weight.detach()

    def latent_table(self) -> Tensor:
        """(K, Z): entries after `post_quant_conv`."""
        return joint_latent_table(self.quantize.embed.weight, self.post_quant_conv)

    def to_images(self, decoded: Tensor) -> Tensor:
        """[-1, 1] -> [0, 1], clamped."""
        return to_unit_range(decoded)
