"""The ranker families behind one interface: how well images fit captions.

    family   network                config          tokenizer
    koclip   engine.models.koclip   KoclipConfig    the transformer's
    clip     engine.models.clip     ClipConfig      its own

What ranking, refinement, metrics and the fast encoder (engine.codec.koclip_encoder) use of each: `config` with image_size and
text_seq_len, `prepare`, `embed_pixels`, `embed_images`, `embed_texts`, `trim`, `image_embedding_shape`, `text_embedding_shape`, `scores`,
`caption_scores` and `loss`.
An embedding is a vector or, with `token_similarity`, a matrix: only `scores` and `caption_scores` look into one.
"""

from engine.config.ranker import ClipConfig, RankerConfig
from engine.models.clip import Clip
from engine.models.koclip import KoClip

Ranker = KoClip | Clip


def build_ranker(config: RankerConfig) -> Ranker:
    """The network of a config, with random weights."""
    return Clip(config) if isinstance(config, ClipConfig) else KoClip(config)
