"""VQGAN: images to image tokens and back.

The network blocks are taming-transformers' own (`taming.modules.diffusionmodules.model`), so the original checkpoints
load by name and compute the same; the quantiser and everything around it is ours. 76,073,859 parameters at f16 with
16,384 codes: encoder 29,298,176, decoder 42,449,795, codebook 4,194,304, the two 1x1 convolutions 131,584.

Images are float [0, 1] at the public boundary (what files, metrics and the ranker use) and [-1, 1] inside (what the
weights were trained on), which only this file and the loss deal with.

```
images [0,1] -> 2x-1 -> encoder -> quant_conv -> nearest entry -> post_quant_conv -> decoder -> [-1,1]
 (B,3,S,S)              (B,Z,h,w)   (B,E,h,w)     (B,N) tokens      (B,Z,h,w)                  (B,3,S,S)
```

Shapes: B images, S image_size in pixels, h = w = grid_size, N = h*w positions, Z latent_channels, E embed_dim.
Source: Esser, Rombach, Ommer 2021, arXiv:2012.09841; CompVis/taming-transformers `VQModel`.
"""

import contextlib
import io
import threading
from collections.abc import Iterator

import torch
from taming.modules.diffusionmodules import model as blocks
from taming.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn

from engine.config.codec import VqganConfig
from engine.errors import InputError
from engine.models.quantiser import VectorQuantizer

_BUILDING = threading.Lock()  # taming's module is the same for all threads


class Vqgan(nn.Module):
    """Encoder, codebook, decoder. State-dict names are taming's (`encoder.*`, `quantize.embedding.weight`, ...).

    Args:
        config: sizes.
        track_usage: keep in training what `quantize.reset_unused` needs (see engine.models.quantiser).

    Raises:
        InputError: the config is of a GumbelVQ (engine.models.gumbel_vqgan).
    """

    def __init__(self, config: VqganConfig, *, track_usage: bool = False) -> None:
        super().__init__()
        if config.family != "vqgan":
            raise InputError("model.family", config.family, "is imported and not trained here: write vqgan")
        self.config = config
        self.encoder, self.decoder = build_networks(config)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            config.embed_dim,
            beta=config.commitment_weight,
            legacy=config.legacy_commitment,
            track_usage=track_usage,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, kernel_size=1, dtype=torch.float32)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1, dtype=torch.float32)

    def forward(self, images: Tensor, *, quantised: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """One training pass.

        Args:
            images: (B, 3, S, S) float in [0, 1].
            quantised: False passes the latents on as they are (`CodebookResetConfig.start_step`): loss 0, no tokens.

        Returns:
            reconstruction (B, 3, S, S), unclamped around [-1, 1]; quantiser loss, scalar float32;
            image_tokens (B, N) int64.

        Raises:
            ValueError: wrong shape or type.
        """
        latents = self.encode_latents(images)
        if not quantised:
            none = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
            return self.decode_latents(latents), latents.new_zeros((), dtype=torch.float32), none
        chosen = self.quantize(latents)
        return self.decode_latents(chosen.latents), chosen.loss, chosen.image_tokens

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens: (B, 3, S, S) in [0, 1] -> (B, N) int64. Same errors as `forward`."""
        latents = self.encode_latents(images)
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, self.config.embed_dim)  # (B*N, E)
        return self.quantize.nearest(vectors).view(len(images), self.config.image_seq_len)

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """Tokens to images: (B, N) integers -> (B, 3, S, S) float in [0, 1].

        Raises:
            ValueError: wrong shape, or a token outside the codebook.
        """
        N, grid = self.config.image_seq_len, self.config.grid_size
        if image_tokens.dim() != 2 or image_tokens.shape[1] != N:
            raise ValueError(f"image tokens must be (B, {N}), got {tuple(image_tokens.shape)}")
        entries = self.quantize.lookup(image_tokens)  # (B, N, E)
        latents = entries.view(len(entries), grid, grid, entries.shape[-1]).permute(0, 3, 1, 2)  # (B, E, h, w)
        return to_unit_range(self.decode_latents(latents))

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encoder outputs before quantisation: (B, 3, S, S) in [0, 1] -> (B, E, h, w)."""
        S = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, S, S):
            raise ValueError(f"images must be (B, 3, {S}, {S}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [0, 1], not {images.dtype}")
        signed = to_signed_range(images).to(self.quant_conv.weight.dtype)
        return self.quant_conv(self.encoder(signed))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decoder: (B, E, h, w) -> (B, 3, S, S), unclamped around [-1, 1]. Without checks, for export."""
        return self.decoder(self.post_quant_conv(latents))

    def code_vectors(self) -> Tensor:
        """(K, E)."""
        return self.quantize.embedding.weight.detach()

    def latent_table(self) -> Tensor:
        """(K, Z): entries after `post_quant_conv`."""
        return joint_latent_table(self.quantize.embedding.weight, self.post_quant_conv)

    def to_images(self, decoded: Tensor) -> Tensor:
        """[-1, 1] -> [0, 1], clamped."""
        return to_unit_range(decoded)

    @torch.no_grad()
    def residual_init(self) -> None:
        """Kaiming-normal convolutions without bias; the last one of each residual branch at zero.

        torch's default shrinks the signal threefold a layer. Measured on 64-pixel synthetic images, base 32, 150 steps
        of 8, mean absolute error of an unquantised pass in [-1, 1]: 0.23 with the default, 0.17 with this.
        Source: He et al. 2015, arXiv:1502.01852; zero branches after Goyal et al. 2017, arXiv:1706.02677.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith((".conv2", ".proj_out")):
                    nn.init.zeros_(module.weight)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, where `engine.models.vqgan_loss` balances the adversarial loss."""
        return self.decoder.conv_out.weight


def build_networks(config: VqganConfig) -> tuple[Encoder, Decoder]:
    """taming's encoder and decoder of a config, with random weights, float32."""
    sizes: dict[str, object] = {
        "ch": config.base_channels,
        "out_ch": 3,
        "ch_mult": config.channel_multipliers,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": config.attention_resolutions,
        "dropout": config.dropout,
        "in_channels": 3,
        "resolution": config.image_size,
        "z_channels": config.latent_channels,
    }
    # taming's Decoder prints its latent shape to standard output, which belongs to the command line's answers.
    with _norm_groups(config.norm_groups), contextlib.redirect_stdout(io.StringIO()):
        # double_z: taming's default is for KL autoencoders and doubles the channels.
        encoder = Encoder(**sizes, double_z=False).float()  # taming builds in the default dtype
        decoder = Decoder(**sizes).float()
    return encoder, decoder


@torch.no_grad()
def joint_latent_table(codebook: Tensor, post_quant_conv: nn.Conv2d) -> Tensor:
    """Latent vectors of all codes, codebook and `post_quant_conv` in one: (K, E) -> (K, Z) float32, in float64."""
    bias = post_quant_conv.bias
    assert bias is not None, "a Conv2d has one by default"
    matrix = post_quant_conv.weight.double()[:, :, 0, 0]  # (Z, E)
    return torch.addmm(bias.double(), codebook.double(), matrix.T).float()


@contextlib.contextmanager
def _norm_groups(groups: int) -> Iterator[None]:
    """Builds taming's blocks with other GroupNorms than its 32 groups, which no narrow network can have.

    At 32 channels that is one channel a group, which removes each channel's mean and with it the image's colours (150 steps
    of 8 images, as in `residual_init`: 0.20 with 32 groups, 0.17 with 4).
    """

    def normalize(in_channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(groups, in_channels, eps=1e-6, affine=True)

    with _BUILDING:
        published, blocks.Normalize = blocks.Normalize, normalize
        try:
            yield
        finally:
            blocks.Normalize = published


def to_signed_range(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], any shape."""
    return images * 2.0 - 1.0


def to_unit_range(signed: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, any shape, as float32 (bfloat16 has too few steps for 8-bit images)."""
    return (signed.float().clamp(-1.0, 1.0) + 1.0) / 2.0
