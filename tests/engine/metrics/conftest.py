"""A tiny model of every part, with random weights, and pairs to evaluate it on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.codec import VqganConfig
from engine.config.ranker import KoclipConfig
from engine.config.transformer import TransformerConfig
from engine.data.pairs import load_pairs
from engine.data.tokenizer import train_tokenizer
from engine.models.folder import Part, write_model_folder
from engine.models.folder_config import PartName
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan
from tests.engine.metrics.evaluation_pairs import write_pairs

VQGAN = VqganConfig(
    image_size=32, base_channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1, attention_resolutions=(),
    latent_channels=16, embed_dim=8, codebook_size=32, norm_groups=4,
)  # fmt: skip
KOCLIP = KoclipConfig(
    image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=8,
    text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=10, embed_dim=16,
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    dim=32, num_layers=1, num_heads=2, head_dim=16, text_vocab_size=64, text_seq_len=8, text_position_rows=10,
    image_vocab_size=32, image_grid_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("evaluate") / "pairs", held_out=16)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Callable[..., Path]:
    """`make_model("vqgan", "koclip")`: a folder with these parts, weights random and always the same.

    `ranker`: options of its KoCLIP.
    """
    folder = tmp_path_factory.mktemp("models")

    def make(*names: PartName, ranker: dict[str, Any] | None = None) -> Path:
        modules: dict[PartName, tuple[Any, Any]] = {
            "vqgan": (Vqgan, VQGAN), "transformer": (KoDalle, TRANSFORMER),
            "koclip": (KoClip, KOCLIP.model_copy(update=ranker)),
        }  # fmt: skip
        parts: dict[PartName, Part] = {}
        for name in names:
            torch.manual_seed(0)
            module, config = modules[name]
            parts[name] = Part(config, module(config).state_dict())
        captions = [pair.captions[0] for pair in load_pairs(pairs).train]
        path = folder / ("-".join([*names, *(ranker or {})]) or "none")
        write_model_folder(path, parts, card="tiny", tokenizer=train_tokenizer(captions, vocab_size=60))
        return path

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("vqgan", "transformer", "koclip")
