"""What the tests of decoding share: a small model whose tokens depend on all that they should, and its captions."""

from typing import Any

import torch

from engine.config.transformer import TransformerConfig
from engine.models.transformer import KoDalle

NULL = torch.tensor([0, 2, 1, 1, 1, 1, 1, 1])
TEXT = torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1], [0, 29, 28, 27, 26, 25, 24, 2]])
CONFIG = TransformerConfig(
    dim=32, num_layers=3, num_heads=2, head_dim=16, text_vocab_size=30, text_seq_len=8, text_position_rows=12,
    image_vocab_size=64, image_grid_size=4,
)  # fmt: skip
MINDALLE: dict[str, Any] = {
    "bos": False, "image_positions": "learned", "qkv_bias": True, "activation": "gelu", "layer_scale": False,
    "separate_heads": True,
}  # fmt: skip
# Options of the transformer that change what a decoder computes, alone and together.
OPTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "x0_scalars": {"x0_scalars": True},
    "target_positions": {"target_positions": True},
    "reversible": {"reversible": True},
    "sandwich_norm": {"sandwich_norm": True},
    "all of DALLE-pytorch": {"reversible": True, "sandwich_norm": True, "stable": True},
    "token_shift": {"token_shift": True},
    "rotary": {"rotary": True},
    "axial": {"attention_patterns": ("axial_row", "axial_col")},
    "convolutions": {"attention_patterns": ("conv", "conv_symmetric", "full")},
    "everything of DALLE-pytorch": {
        "reversible": True,
        "sandwich_norm": True,
        "stable": True,
        "token_shift": True,
        "rotary": True,
        "attention_patterns": ("axial_row", "conv", "axial_col"),
    },
    "minDALL-E": MINDALLE,
    "minDALL-E, approximated": MINDALLE | {"activation": "quick_gelu"},
    "all": {"qk_norm": True, "zero_init_branches": True, "x0_scalars": True, "target_positions": True},
}


def random_model(config: TransformerConfig = CONFIG) -> KoDalle:
    """Fresh weights, enlarged: a fresh model's tokens depend on hardly anything but their neighbour and the noise."""
    torch.manual_seed(0)
    model = KoDalle(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
            elif name.endswith("x0_scalars"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif config.zero_init_branches and name.endswith(("out.weight", "shrink.weight")):
                parameter.normal_(0, 0.3)
            elif name.endswith(("qkv.weight", "attention.out.weight", "head.weight")):
                parameter.mul_(3)
    return model
