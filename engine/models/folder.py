"""The model folder: what training exports, import writes and the server loads.

    config.json               {"format": 1, "vqgan": {…}, "transformer": {…}, "koclip": {…}}; each part optional;
                              "ground": "#rrggbb" where its pictures are cut-outs on a plain ground
    <part>.safetensors        its weights; `vqgan` is the codec and `koclip` the ranker, of whatever
                              family (engine/models/image_codec.py, engine/models/ranker.py)
    tokenizer.json, …         Hugging Face tokenizer files
    ranker_tokenizer/         those of a ranker that has its own; optional
    generation_config.json    default sampling parameters; optional
    captions.json             how to write captions for it: examples, words, attributes, synonyms, form of sentences; optional
    real_scores.json          the ranker's scores of held-out pairs; optional
    model_card.md             data, training, figures, limits
    SHA256SUMS                digests (engine/models/folder_integrity.py); optional

No pickles. Loading compares names and shapes with the config before it allocates anything, then weights, token numbers and
digests, and names the first fault.
Networks are float32 whatever torch's default dtype is.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config.codec import CodecConfig
from engine.config.generation import GenerationConfig
from engine.config.ranker import RankerConfig
from engine.config.section import Section
from engine.config.transformer import TransformerConfig
from engine.config_files import parse_section
from engine.data.caption_guide import CaptionGuide, read_guide, write_guide
from engine.data.cut_out import ground_rgb
from engine.data.tokenizer import CaptionTokenizer, load_tokenizer
from engine.errors import InputError
from engine.files import atomic_folder, check_folder_place, read_json, write_json
from engine.models.folder_integrity import check_sizes, check_sums, check_weight, write_sums
from engine.models.image_codec import build_codec
from engine.models.ranker import build_ranker
from engine.models.real_scores import REAL_SCORES_FILE, RealScores, read_real_scores, write_real_scores
from engine.models.transformer import KoDalle
from engine.models.uninitialised import Uninitialised
from engine.models.weight_file import LazyTensor, write_weight_file

FOLDER_FORMAT = 1
GENERATION_FILE = "generation_config.json"
RANKER_TOKENIZER = "ranker_tokenizer"
PartName = Literal["vqgan", "transformer", "koclip"]
_CONFIGS: dict[PartName, Any] = {
    "vqgan": TypeAdapter(CodecConfig),
    "transformer": TransformerConfig,
    "koclip": TypeAdapter(RankerConfig),
}
_MODULES: dict[PartName, Any] = {"vqgan": build_codec, "transformer": KoDalle, "koclip": build_ranker}


@dataclass(frozen=True)
class LazyPart:
    """One network whose weights are read when they are written: its config, and name to `LazyTensor`."""

    config: Section
    weights: dict[str, LazyTensor]


@dataclass(frozen=True)
class Part:
    """One network of a folder: its config and its weights (name to tensor)."""

    config: Section
    weights: dict[str, Tensor]


def write_model_folder(
    destination: Path,
    parts: Mapping[PartName, Part | LazyPart],
    *,
    card: str,
    tokenizer: CaptionTokenizer | None = None,
    ranker_tokenizer: CaptionTokenizer | None = None,
    generation: GenerationConfig | None = None,
    caption_guide: CaptionGuide | None = None,
    real_scores: RealScores | None = None,
    ground: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a complete folder and renames it into place; replaces an older model of the same name.

    Args:
        real_scores: of the ranker among `parts`, whatever type its weights are stored in.
        ground: the colour around the objects, `#rrggbb`, of a model that learned from cut-outs.
        dtype: floating-point weights are stored in it (None: as they are).

    Raises:
        InputError: `destination` holds anything but a model.
    """
    check_folder_place(destination, field="destination", holds="config.json", what="a model")
    with atomic_folder(destination, replace=True) as folder:
        config: dict[str, Any] = {"format": FOLDER_FORMAT}
        for name, part in parts.items():
            config[name] = part.config.model_dump(mode="json")
            weights = {
                key: value if isinstance(value, LazyTensor) else LazyTensor.of(value)
                for key, value in part.weights.items()
            }
            if dtype is not None:
                weights = {key: value.to(dtype) for key, value in weights.items()}
            write_weight_file(folder / f"{name}.safetensors", weights)
        if tokenizer is not None:
            tokenizer.save(folder)
        if ranker_tokenizer is not None:
            ranker_tokenizer.save(folder / RANKER_TOKENIZER)
        if generation is not None and generation != GenerationConfig():
            write_json(folder / GENERATION_FILE, generation.model_dump(mode="json", exclude_none=True))
        if caption_guide is not None:
            write_guide(folder, caption_guide)
        if ground is not None:
            config["ground"] = ground
        write_json(folder / "config.json", config)
        if real_scores is not None:
            digest = weights_digest(folder, "koclip")
            write_real_scores(folder, real_scores.model_copy(update={"ranker": digest}))
        (folder / "model_card.md").write_text(card, encoding="utf-8")
        write_sums(folder)


def convert_model_folder(source: Path, destination: Path, *, dtype: torch.dtype) -> int:
    """A copy of a model folder with weights of another type, as its card says.

    Returns:
        Bytes of the new weight files.

    Raises:
        InputError: `source` is no complete model folder; a weight that `dtype` cannot hold; or `destination`
            is `source` or holds anything but a model.
    """
    if destination.resolve() == source.resolve():
        raise InputError("destination", destination, "is the model itself: give another folder")
    parts = {name: read_part(source, name) for name in _CONFIGS if has_part(source, name)}
    for part_name, part in parts.items():
        for name, value in part.weights.items():
            if value.is_floating_point() and not bool(value.to(dtype).isfinite().all()):
                most = float(value.abs().max())
                raise InputError(f"{part_name} {name}", dtype, f"cannot hold its values, up to {most:.3g}")
    card = source / "model_card.md"
    card_text = card.read_text(encoding="utf-8") if card.is_file() else "# A model\n"
    type_name = str(dtype).removeprefix("torch.")
    write_model_folder(
        destination,
        parts,
        card=f"{card_text.rstrip()}\n\n## Weights\n\nConverted to {type_name} after training.\n",
        tokenizer=load_folder_tokenizer(source) if (source / "tokenizer.json").is_file() else None,
        ranker_tokenizer=load_own_ranker_tokenizer(source),
        generation=read_generation(source),
        caption_guide=read_guide(source),
        real_scores=own_real_scores(source),
        ground=read_ground(source),
        dtype=dtype,
    )
    return sum((destination / f"{name}.safetensors").stat().st_size for name in parts)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, its format checked."""
    if not folder.is_dir():
        raise InputError("model folder", folder, "no such folder: train first, or give the folder of a trained model")
    config = read_json(folder / "config.json", field="model folder", remedy="give a folder that training exported")
    if not isinstance(config, dict) or config.get("format") != FOLDER_FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise InputError(f"{folder / 'config.json'} format", found, f"this version reads format {FOLDER_FORMAT}")
    return config


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


def own_real_scores(folder: Path) -> RealScores | None:
    """The scores of real pairs of a folder's ranker; None where it has none, or those of another ranker, as a line says.

    Raises:
        InputError: their file is not of its form.
    """
    found = read_real_scores(folder)
    if found is None or not has_part(folder, "koclip") or found.ranker == weights_digest(folder, "koclip"):
        return found
    print(
        f"note: {folder / REAL_SCORES_FILE} is of another ranker, so scores have no place among real pairs: "
        "make it again with `kodalle calibrate`",
        file=sys.stderr,
    )
    return None


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
        held = ", ".join(part for part in _CONFIGS if part in config) or "none"
        raise InputError("model folder", folder, f"has no {name} (it holds: {held}): give a folder that has one")
    source = str(folder / "config.json")
    section = parse_section(_CONFIGS[name], config[name], source=source)
    check_sizes(section, source=source)
    return section


def read_part(folder: Path, name: PartName) -> Part:
    """Config and weights of one part, names and shapes checked, weights in float32.

    Raises:
        InputError: missing file, not safetensors, missing or extra tensors, a wrong shape or type, values that are not
            finite: each by name; a file that is not the exported one.
    """
    config = part_config(folder, name)
    path = _weight_file(folder, name)
    expected = _expected(name, config)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
            _compare(found, {key: tuple(value.shape) for key, value in expected.items()}, path)
            weights = {key: _as_float32(file.get_tensor(key)) for key in found}
    except SafetensorError as error:
        raise InputError(
            "weight file", path, f"is not a complete safetensors file ({error}): export it again"
        ) from error
    for key, value in weights.items():
        check_weight(value, expected[key], field=f"{path} {key}")
    check_sums(folder, "config.json", path.name)
    return Part(config, weights)


def expected_shapes(name: PartName, config: Section) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a network of this config has."""
    return {key: tuple(value.shape) for key, value in _expected(name, config).items()}


def _expected(name: PartName, config: Section) -> dict[str, Tensor]:
    with torch.device("meta"), Uninitialised():
        tensors: dict[str, Tensor] = _MODULES[name](config).state_dict()
    return tensors


def load_part(folder: Path, name: PartName) -> Any:
    """The network itself (an `ImageCodec`, a `KoDalle` or a `Ranker`), in eval mode, float32, on the CPU."""
    part = read_part(folder, name)
    with torch.device("cpu"), Uninitialised():  # whatever torch's default device and dtype are
        module: nn.Module = _MODULES[name](part.config).float()
    module.load_state_dict(part.weights, strict=True)
    return module.eval()


def load_folder_tokenizer(folder: Path) -> CaptionTokenizer:
    """The tokenizer of a model folder.

    Raises:
        InputError: the folder has none, or one with more entries than the networks that read it have rows.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError("model folder", folder, "has no tokenizer.json: export the model again")
    readers: list[PartName] = ["transformer"]
    if not (folder / RANKER_TOKENIZER).is_dir():
        readers.append("koclip")
    return _checked_tokenizer(folder, "", readers)


def load_own_ranker_tokenizer(folder: Path) -> CaptionTokenizer | None:
    """The tokenizer that only the ranker of a folder uses; None: it uses the folder's. Raises as `load_folder_tokenizer`."""
    if not (folder / RANKER_TOKENIZER).is_dir():
        return None
    return _checked_tokenizer(folder, f"{RANKER_TOKENIZER}/", ["koclip"])


def _checked_tokenizer(folder: Path, place: str, readers: list[PartName]) -> CaptionTokenizer:
    tokenizer = load_tokenizer(str(folder / place))
    for name in readers:
        if has_part(folder, name):
            rows = part_config(folder, name).text_vocab_size
            if tokenizer.num_rows > rows:
                remedy = f"the {name}'s token table has {rows} rows: use the tokenizer that it was trained with"
                raise InputError("tokenizer", f"{folder / place} with {tokenizer.num_rows} entries", remedy)
    check_sums(folder, f"{place}tokenizer.json", f"{place}tokenizer_config.json")
    return tokenizer


def load_ranker_tokenizer(folder: Path) -> CaptionTokenizer:
    """The tokenizer of a folder's ranker: its own, or the one it shares with the transformer."""
    return load_own_ranker_tokenizer(folder) or load_folder_tokenizer(folder)


def weights_digest(folder: Path, name: PartName) -> str:
    """16 hex digits over config and weight bytes of one part: the key of caches.

    Raises:
        InputError: the folder has no such part.
    """
    part_config(folder, name)
    digest = hashlib.sha256(json.dumps(read_config(folder)[name], sort_keys=True).encode())
    path = _weight_file(folder, name)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """SHA-256, in hex, over the digests of all parts of a folder."""
    digests = [weights_digest(folder, name) for name in _CONFIGS if has_part(folder, name)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _weight_file(folder: Path, name: PartName) -> Path:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise InputError("weight file", path, "is missing: copy it there, or export the model again")
    return path


def _compare(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing:
        raise InputError(str(path), missing[0], f"tensor is missing ({len(missing)} in all): export the model again")
    if extra:
        raise InputError(str(path), extra[0], f"unexpected tensor ({len(extra)} in all): wrong file for this config")
    for key, shape in expected.items():
        if found[key] != shape:
            raise InputError(f"{path} {key}", list(found[key]), f"config.json requires shape {list(shape)}")


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
