"""lucidrains' dalle-pytorch as a baseline, if it is installed; nothing here depends on it.

Its model is built at our sizes with its own random weights and the published choices: full attention, learned positions
(no rotary embedding), no token shift. Its `generate_images` has no cache in effect: `use_cache` is dropped unless
guidance is on (1.6.6), and then guidance has no effect. Its own tiny VAE stands in for the VQGAN and takes no time.
"""

import importlib
import importlib.util
from typing import Any

from engine.config.transformer import TransformerConfig


def missing() -> str | None:
    """Why it cannot run here, or None."""
    return None if importlib.util.find_spec("dalle_pytorch") else "not installed"


def build(config: TransformerConfig) -> Any:
    """A `dalle_pytorch.DALLE` in eval mode, on the CPU."""
    dalle_pytorch = importlib.import_module("dalle_pytorch")
    num_halvings = 4
    vae = dalle_pytorch.DiscreteVAE(
        image_size=config.image_grid_size * 2**num_halvings,
        num_layers=num_halvings,
        num_tokens=config.image_vocab_size,
        codebook_dim=16,
        hidden_dim=16,
    )
    dalle = dalle_pytorch.DALLE(
        dim=config.dim,
        vae=vae,
        num_text_tokens=config.text_vocab_size,
        text_seq_len=config.text_seq_len,
        depth=config.num_layers,
        heads=config.num_heads,
        dim_head=config.head_dim,
        attn_types=("full",),
        shift_tokens=False,
        rotary_emb=False,
    )
    return dalle.eval()
