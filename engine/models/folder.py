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

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config.generation import GenerationConfig
from engine.config.section import Section
from engine.data.caption_guide import CaptionGuide, read_guide, write_guide
from engine.data.tokenizer import CaptionTokenizer, load_tokenizer
from engine.errors import InputError
from engine.files import atomic_folder, check_folder_place, write_json
from engine.models.folder_config import (
    FOLDER_FORMAT,
    GENERATION_FILE,
    PART_CONFIGS,
    PartName,
    has_part,
    part_config,
    read_generation,
    read_ground,
    weight_file,
    weights_digest,
)
from engine.models.folder_integrity import check_sums, check_weight, write_sums
from engine.models.image_codec import build_codec
from engine.models.ranker import build_ranker
from engine.models.real_scores import REAL_SCORES_FILE, RealScores, read_real_scores, write_real_scores
from engine.models.transformer import KoDalle
from engine.models.uninitialised import Uninitialised
from engine.models.weight_file import LazyTensor, write_weight_file

RANKER_TOKENIZER = "ranker_tokenizer"
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
    parts = {name: read_part(source, name) for name in PART_CONFIGS if has_part(source, name)}
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


def read_part(folder: Path, name: PartName) -> Part:
    """Config and weights of one part, names and shapes checked, weights in float32.

    Raises:
        InputError: missing file, not safetensors, missing or extra tensors, a wrong shape or type, values that are not
            finite: each by name; a file that is not the exported one.
    """
    config = part_config(folder, name)
    path = weight_file(folder, name)
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
