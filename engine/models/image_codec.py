"""The codec families behind one interface: images to image tokens and back.

    family         network                         config               where it comes from
    vqgan          engine.models.vqgan             VqganConfig          trained here, KoDALLE, minDALL-E, taming `VQModel`
    gumbel-vqgan   engine.models.gumbel_vqgan      VqganConfig          taming `GumbelVQ`, imported only
    discrete-vae   engine.models.discrete_vae      DiscreteVaeConfig    DALLE-pytorch `DiscreteVAE`, imported only
    openai-dvae    engine.models.openai_dvae       OpenaiDvaeConfig     trained here, OpenAI's `dall_e`

What pipeline, token shards, training and the fast decoders (engine.codec) use of each:

    config           image_size, grid_size, image_seq_len, codebook_size
    encode           (B, 3, S, S) in [0, 1] -> (B, N) int64, deterministic
    decode           (B, N) -> (B, 3, S, S) float32 in [0, 1]
    code_vectors     (K, any width): a vector for each code, alike for codes that look alike
    latent_table     (K, Z) float32: what the decoder reads for each token
    decoder          (B, Z, h, w) -> what `to_images` takes
    to_images        -> (B, 3, S, S) float32 in [0, 1]

B images, S pixels, N = h*w image tokens, K codes, Z width of a latent vector.
"""

from engine.config.codec import CodecConfig, DiscreteVaeConfig, OpenaiDvaeConfig
from engine.models.discrete_vae import DiscreteVae
from engine.models.gumbel_vqgan import GumbelVqgan
from engine.models.openai_dvae import OpenaiDvae
from engine.models.vqgan import Vqgan

ImageCodec = Vqgan | GumbelVqgan | DiscreteVae | OpenaiDvae


def build_codec(config: CodecConfig) -> ImageCodec:
    """The network of a config, with random weights."""
    if isinstance(config, DiscreteVaeConfig):
        return DiscreteVae(config)
    if isinstance(config, OpenaiDvaeConfig):
        return OpenaiDvae(config)
    return Vqgan(config) if config.family == "vqgan" else GumbelVqgan(config)
