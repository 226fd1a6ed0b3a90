"""What the sampling benchmark measures: the variants, the workload, and a model of random weights to measure it on.

The time of a step does not depend on the values of the weights, so random ones of the published sizes do; they are written
as a model folder and loaded by the pipeline itself, which makes the memory figures those of a real start.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from machine_facts import REPOSITORY

from engine.config.codec import VqganConfig
from engine.config.ranker import KoclipConfig
from engine.config.stages import KoclipRun, KodalleRun, VqganRun
from engine.config.transformer import TransformerConfig
from engine.config_files import load_run
from engine.data.tokenizer import train_tokenizer
from engine.device import cpu_capabilities, default_dtype
from engine.models.folder import Part, write_model_folder
from engine.models.folder_config import PartName
from engine.models.koclip import KoClip
from engine.models.transformer import KoDalle
from engine.models.vqgan import Vqgan

CAPTION = "상의에서 색상은 레드이다. 상의에서 카테고리는 셔츠이다. 하의에서 카테고리는 청바지이다."
PARTS = ("ours", "uncached", "cached", "dalle-pytorch")
_CONFIGS = REPOSITORY / "configs" / "kodalle"

_PUBLISHED_PARAMETERS = 334_974_336
VariantName = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class Variant:
    """A way of generating images, measured in a process of its own."""

    name: VariantName
    dtype: str  # of the pipeline
    int8: bool  # the pipeline's option
    weight_bytes: float  # of one weight as a decode step reads it; small layers of int8 stay in float32, unaccounted
    matrix_dtype: str  # of the decode step's products; the VQGAN's floor is at its rate, too, though int8 decodes images in float32
    has_baselines: bool  # others are measured beside it, in the same dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        return _dtype(self.dtype)

    @property
    def torch_matrix_dtype(self) -> torch.dtype:
        return _dtype(self.matrix_dtype)


# Another way of generating goes here, and into `default_variants` where it can run.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("float32", "float32", False, weight_bytes=4, matrix_dtype="float32", has_baselines=True),
        Variant("bfloat16", "bfloat16", False, weight_bytes=2, matrix_dtype="bfloat16", has_baselines=True),
        Variant("float16", "float16", False, weight_bytes=2, matrix_dtype="float16", has_baselines=True),
        Variant("int8", "float32", True, weight_bytes=1, matrix_dtype="int8", has_baselines=False),
    )
}


def default_variants(device: torch.device) -> list[str]:
    """The default on this device, and the other variants that it offers."""
    usual = str(default_dtype(device, _PUBLISHED_PARAMETERS)).removeprefix("torch.")
    if device.type == "cuda":
        return list(dict.fromkeys([usual, "float16"]))
    return [usual] + (["int8"] if cpu_capabilities().packs_int8 else [])


@dataclass(frozen=True)
class SamplingPlan:
    """One process's work; travels as JSON.

    repeat: runs of each row at most.
    row_budget_s: no run begins later than this; two runs are made in any case, unless `repeat` is 1.
    candidates: of one caption, in the larger row.
    lengths_one, lengths_many: at how many lengths the uncached loop is timed for 1 and for `candidates` images;
        0: it is run whole.
    """

    model: str
    device: str
    variant: VariantName
    parts: tuple[str, ...]
    repeat: int
    row_budget_s: float
    candidates: int
    lengths_one: int
    lengths_many: int
    rate_seconds: float  # how long each of the machine's rates is measured
    rate_bytes: int | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SamplingPlan":
        tree: dict[str, Any] = json.loads(text)
        return cls(**(tree | {"parts": tuple(tree["parts"])}))


def published_sizes() -> tuple[TransformerConfig, VqganConfig, KoclipConfig]:
    """What configs/kodalle trains: 335 M + 76 M + 116 M parameters."""
    kodalle, vqgan, koclip = (load_run(_CONFIGS / f"{name}.yaml") for name in ("kodalle", "vqgan", "koclip"))
    assert isinstance(kodalle, KodalleRun)
    assert isinstance(vqgan, VqganRun)
    assert isinstance(koclip, KoclipRun)
    return kodalle.model, vqgan.model, koclip.model


def tiny_sizes() -> tuple[TransformerConfig, VqganConfig, KoclipConfig]:
    """The same shapes at a size that generates in a fraction of a second: 16 tokens of 32, 16 pixels."""
    transformer = TransformerConfig(
        dim=128, num_layers=2, num_heads=2, head_dim=32, text_vocab_size=64, text_seq_len=12, text_position_rows=16,
        image_vocab_size=32, image_grid_size=4,
    )  # fmt: skip
    vqgan = VqganConfig(
        image_size=16, base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(),
        latent_channels=16, embed_dim=8, codebook_size=32,
    )  # fmt: skip
    koclip = KoclipConfig(
        image_size=32, image_width=0.1, image_depth=0.1, image_hidden_dim=128, text_vocab_size=64, text_seq_len=12,
        text_dim=32, text_layers=1, text_heads=2, text_ff_dim=64, text_position_rows=14, embed_dim=16,
    )  # fmt: skip
    return transformer, vqgan, koclip


def write_random_model(folder: Path, *, tiny: bool) -> None:
    """A model folder of random float32 weights, equal on every machine with this torch."""
    transformer, vqgan, koclip = tiny_sizes() if tiny else published_sizes()
    torch.manual_seed(0)
    models = {"transformer": KoDalle(transformer), "vqgan": Vqgan(vqgan), "koclip": KoClip(koclip)}
    parts: dict[PartName, Part] = {
        name: Part(model.config, model.state_dict())  # type: ignore[misc, arg-type]
        for name, model in models.items()
    }
    tokenizer = train_tokenizer([CAPTION], vocab_size=64)
    write_model_folder(folder, parts, card="Random weights, for timing.\n", tokenizer=tokenizer)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
