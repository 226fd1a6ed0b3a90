"""What a model folder says of itself: config.json, the sections of its parts, default sampling parameters, digests.

Without torch, so that a command can name what a folder lacks before it spends seconds on imports. The rest of a folder, and the
form of it all: engine.models.folder.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from engine.config.codec import CodecConfig
from engine.config.generation import GenerationConfig
from engine.config.ranker import RankerConfig
from engine.config.section import Section, parse_section
from engine.config.transformer import TransformerConfig
from engine.data.ground import ground_rgb
from engine.errors import InputError
from engine.files import read_json

FOLDER_FORMAT = 1
GENERATION_FILE = "generation_config.json"
PartName = Literal["vqgan", "transformer", "koclip"]
PART_CONFIGS: dict[PartName, Any] = {
    "vqgan": TypeAdapter(CodecConfig),
    "transformer": TransformerConfig,
    "koclip": TypeAdapter(RankerConfig),
}
"""How each part is described; the order of parts in digests."""

# Far beyond any network, and far below what takes a machine's memory before the weights are compared.
_MOST = 2**20
_MOST_OF = {
    "num_layers": 1000, "text_layers": 1000, "image_layers": 1000, "num_res_blocks": 1000, "blocks_per_group": 1000,
    "image_width": 100, "image_depth": 100, "image_size": 2**14, "image_grid_size": 2**8, "text_seq_len": 2**14,
}  # fmt: skip
_MOST_ENTRIES = 1000


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, its format checked."""
    if not folder.is_dir():
        raise InputError("model folder", folder, "no such folder: train first, or give the folder of a trained model")
    config = read_json(folder / "config.json", field="model folder", remedy="give a folder that training exported")
    if not isinstance(config, dict) or config.get("format") != FOLDER_FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise InputError(f"{folder / 'config.json'} format", found, f"this version reads format {FOLDER_FORMAT}")
    return config


def has_part(folder: Path, name: PartName) -> bool:
    """Whether a model folder has a network of that name."""
    return name in read_config(folder)


def part_config(folder: Path, name: PartName) -> Any:
    """The config section of one part.

    Raises:
        InputError: the folder has no such part, or its section is not valid or has sizes that no network has.
    """
    config = read_config(folder)
    if name not in config:
        held = ", ".join(part for part in PART_CONFIGS if part in config) or "none"
        raise InputError("model folder", folder, f"has no {name} (it holds: {held}): give a folder that has one")
    source = str(folder / "config.json")
    section = parse_section(PART_CONFIGS[name], config[name], source=source)
    check_sizes(section, source=source)
    return section


def check_sizes(config: Section, *, source: str) -> None:
    """Raises InputError for a size that no network has, before one of that size is built."""
    for name, value in config.model_dump().items():
        values = value if isinstance(value, list | tuple) else (value,)
        if len(values) > _MOST_ENTRIES:
            raise InputError(name, f"{len(values)} entries", f"at most {_MOST_ENTRIES} can be read, in {source}")
        most = _MOST_OF.get(name, _MOST)
        if any(_is_number(one) and one > most for one in values):
            raise InputError(name, str(value)[:40], f"at most {most:,} can be read, in {source}")


def read_generation(folder: Path) -> GenerationConfig:
    """Default sampling parameters of a model folder.

    Raises:
        InputError: its file is no JSON, or has an unknown parameter or a value out of range.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return GenerationConfig()
    tree = read_json(path, field="model folder", remedy="mend it, or remove it")
    generation: GenerationConfig = parse_section(GenerationConfig, tree, source=str(path))
    return generation


def read_ground(folder: Path) -> str | None:
    """The colour around the objects in a model's pictures, `#rrggbb`; None if they have no plain ground.

    Raises:
        InputError: config.json names something else than a colour.
    """
    ground: str | None = read_config(folder).get("ground")
    if ground is not None:
        ground_rgb(ground)
    return ground


def weights_digest(folder: Path, name: PartName) -> str:
    """16 hex digits over config and weight bytes of one part: the key of caches.

    Raises:
        InputError: the folder has no such part.
    """
    part_config(folder, name)
    digest = hashlib.sha256(json.dumps(read_config(folder)[name], sort_keys=True).encode())
    path = weight_file(folder, name)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """SHA-256, in hex, over the digests of all parts of a folder."""
    digests = [weights_digest(folder, name) for name in PART_CONFIGS if has_part(folder, name)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def weight_file(folder: Path, name: PartName) -> Path:
    """Where the weights of a part are. Raises InputError where they are not."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise InputError("weight file", path, "is missing: copy it there, or export the model again")
    return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
