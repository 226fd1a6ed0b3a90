"""Other projects' checkpoints to model folders: `kodalle import SRC DST`.

What a source is follows from its content (engine.interop.checkpoint), never from its name; `kind` only states what it must
be. Tensors are read when they are written, so that a checkpoint of any size needs the memory of its largest tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from engine.config.generation import GenerationConfig
from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import CaptionTokenizer, check_padding, load_tokenizer
from engine.errors import InputError
from engine.interop.checkpoint import Checkpoint, open_checkpoint, taming_config, torch_files
from engine.interop.clip_reader import is_clip_folder, read_clip_folder
from engine.interop.codec_readers import (
    is_discrete_vae,
    is_taming,
    openai_side,
    read_discrete_vae,
    read_openai_dvae,
    read_taming,
)
from engine.interop.dalle_reader import codec_weights, is_dalle, read_dalle
from engine.interop.deepspeed_folder import is_deepspeed_folder, open_deepspeed_folder
from engine.interop.koclip_reader import is_koclip, read_koclip
from engine.interop.mindalle_reader import (
    class_names,
    codec_config,
    is_mindalle,
    mindalle_config,
    mindalle_tokenizer,
    read_mindalle,
    stages,
)
from engine.interop.tar_folder import is_tar, unpacked
from engine.interop.trees import Weights, check_shapes
from engine.models.folder import LazyPart, expected_shapes, write_model_folder
from engine.models.folder_config import PartName

MINDALLE_TOP_K = 256  # of minDALL-E's own sampling
_MAX_FILES = 1000  # of a folder that are looked at
Kind = Literal["kodalle", "dalle", "mindalle", "vqgan", "discrete-vae", "openai-dvae", "koclip", "clip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NAMES: dict[Kind, str] = {
    "kodalle": "KoDALLE",
    "dalle": "DALLE-pytorch DALLE",
    "mindalle": "minDALL-E",
    "vqgan": "taming VQModel or GumbelVQ",
    "discrete-vae": "DALLE-pytorch DiscreteVAE",
    "openai-dvae": "OpenAI dVAE",
    "koclip": "KoCLIP",
    "clip": "CLIPModel",
}


@dataclass(frozen=True)
class Imported:
    """What was found in a source, before it is written."""

    kind: Kind
    parts: dict[PartName, LazyPart]
    notes: list[str] = field(default_factory=list)
    ranker_tokenizer: CaptionTokenizer | None = None
    tokenizer: CaptionTokenizer | None = None
    generation: GenerationConfig | None = None

    @property
    def name(self) -> str:
        return _NAMES[self.kind]


@dataclass(frozen=True)
class ImportOptions:
    """What files do not say.

    Attributes:
        config: taming's yaml, where it is not beside the checkpoint.
        image_size: in pixels, for codecs whose files do not state it.
        tokenizer: folder or hub name of the tokenizer that a transformer was trained with; no checkpoint has one.
    """

    config: Path | None = None
    image_size: int | None = None
    tokenizer: str | None = None


def import_checkpoint(
    source: Path, destination: Path, *, kind: Kind | None = None, options: ImportOptions | None = None
) -> Imported:
    """Writes a model folder from a checkpoint of another project.

    Args:
        source: file or folder.
        destination: the model folder; an older model there is replaced, once the new one is complete.
        kind: what the source must be; None: whatever it is.

    Raises:
        InputError: nothing that is known, another kind, a tensor that is missing or of another shape (by name, with both
            shapes), or a file that asks for code to be run. Nothing is written then.
    """
    if not source.exists():
        raise InputError("source", source, "no such file or folder")
    options = options or ImportOptions()
    archive = _archive(source)
    if archive is None:
        return _import(source, destination, kind, options)
    with unpacked(archive, beside=destination) as folder:
        try:
            return _import(folder, destination, kind, options, shown=archive)
        except InputError as error:  # of files that are gone by now: the archive's name stands for their folder
            parts = (str(part).replace(str(folder), str(archive)) for part in (error.field, error.value, error.remedy))
            raise InputError(*parts) from error


def _archive(source: Path) -> Path | None:
    """The tar archive that a source is, or the only one in a folder without checkpoints; None: there is none."""
    if not source.is_dir():
        return source if is_tar(source) else None
    if torch_files(source) or is_clip_folder(source) or is_deepspeed_folder(source):
        return None
    archives = [path for path in sorted(source.iterdir())[:_MAX_FILES] if path.is_file() and is_tar(path)]
    return archives[0] if len(archives) == 1 else None


def _import(
    source: Path, destination: Path, kind: Kind | None, options: ImportOptions, *, shown: Path | None = None
) -> Imported:
    found = inspect(source, options)
    if kind is not None and kind != found.kind:
        raise InputError("--kind", kind, f"{shown or source} holds a {found.name}: write {found.kind}, or auto")
    for name, part in found.parts.items():
        check_shapes(part.weights, expected_shapes(name, part.config), source)
    write_model_folder(
        destination, found.parts, card=_card(found, shown or source), tokenizer=_tokenizer(found, options),
        ranker_tokenizer=found.ranker_tokenizer, generation=found.generation,
    )  # fmt: skip
    return found


def inspect(source: Path, options: ImportOptions) -> Imported:
    """What a source holds. Same errors, except for shapes."""
    if not source.is_dir():
        return _of_file(open_checkpoint(source), options)
    if is_clip_folder(source):
        clip = read_clip_folder(source)
        return Imported("clip", {"koclip": LazyPart(clip.config, clip.weights)}, clip.notes, clip.tokenizer)
    if is_deepspeed_folder(source):
        return _of_file(open_deepspeed_folder(source), options)
    checkpoints = [open_checkpoint(path) for path in torch_files(source)]
    if not checkpoints:
        nested = [path for path in source.iterdir() if path.is_dir()]
        if len(nested) == 1 and is_deepspeed_folder(nested[0]):
            return _of_file(open_deepspeed_folder(nested[0]), options)
        raise InputError(
            "source", source, "holds no checkpoint: give a folder with files of torch.save, or one of them"
        )
    sides = [openai_side(checkpoint.weights) for checkpoint in checkpoints]
    if len(checkpoints) == 2 and all(sides):
        return _openai_dvae(checkpoints)(options)
    transformers = [checkpoint for checkpoint in checkpoints if is_mindalle(checkpoint.names)]
    codecs = [checkpoint for checkpoint in checkpoints if is_taming(checkpoint.names)]
    if len(checkpoints) == 2 and len(transformers) == len(codecs) == 1:
        return _mindalle(transformers[0], options, codec=codecs[0])
    known = [checkpoint for checkpoint in checkpoints if _reader(checkpoint) is not None]
    if len(checkpoints) == 1 or len(known) == 1:  # a KoDALLE's text tables may lie beside it: `weights` has newer ones
        return _of_file((known or checkpoints)[0], options)
    names = ", ".join(checkpoint.path.name for checkpoint in checkpoints[:5])
    raise InputError("source", source, f"holds {len(checkpoints)} checkpoints ({names}): give one of them")


_Read = Callable[[ImportOptions], Imported]


def _of_file(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    read = _reader(checkpoint)
    if read is None:
        shown = ", ".join(sorted(checkpoint.names)[:3])
        known = ", ".join(_NAMES.values())
        raise InputError("checkpoint", checkpoint.path, f"is of no known kind, its tensors are {shown}, …: {known} are")
    return read(options)


def _reader(checkpoint: Checkpoint) -> _Read | None:
    """What reads a checkpoint; None: it is of no known kind."""
    names, weights = checkpoint.names, checkpoint.weights
    if is_dalle(names):
        return lambda options: _dalle(checkpoint, options)
    if is_mindalle(names):
        return lambda options: _mindalle(checkpoint, options)
    if is_koclip(names):
        return lambda _: _koclip(checkpoint)
    if openai_side(weights) is not None:
        return lambda options: _openai_file(checkpoint, options)
    if is_taming(names):
        return lambda options: _taming(weights, checkpoint, options)
    if is_discrete_vae(names):
        return lambda options: _discrete_vae(weights, checkpoint, options)
    return None


def _dalle(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """A transformer with the codec that is saved inside of it."""
    found = read_dalle(checkpoint.weights, checkpoint.hparams, checkpoint.path, version=checkpoint.version)
    family, weights = codec_weights(checkpoint.weights)
    if not weights:
        raise InputError(
            "checkpoint", checkpoint.path, "has no codec in it: it makes image tokens of an unknown codebook"
        )
    if family == "vqgan":
        codec = _taming(weights, checkpoint, options)
    elif family == "openai-dvae":
        sides = {
            side: {
                name.removeprefix(f"{side}."): value for name, value in weights.items() if name.startswith(f"{side}.")
            }
            for side in ("enc", "dec")
        }
        codec = _both_sides(sides["enc"], sides["dec"], checkpoint.path, options)
    else:
        codec = _discrete_vae(weights, checkpoint, options)
    _check_codec(found.config, codec, checkpoint.path)
    parts: dict[PartName, LazyPart] = {"transformer": LazyPart(found.config, found.weights), **codec.parts}
    notes = found.notes + codec.notes
    if options.tokenizer is None:
        notes.append("checkpoints have no tokenizer: give the one that it was trained with by --tokenizer to generate")
    return Imported("kodalle" if found.is_kodalle else "dalle", parts, notes)


def _mindalle(checkpoint: Checkpoint, options: ImportOptions, *, codec: Checkpoint | None = None) -> Imported:
    """A transformer of minDALL-E with its codec, which lies beside it or in the same file."""
    source = checkpoint.path
    tree = mindalle_config(source, options.config)
    codec_weights, weights = stages(checkpoint.weights)
    found = read_mindalle(weights, tree, source)
    if codec is not None:
        codec_weights = codec.weights
    if not codec_weights:
        raise InputError(
            "checkpoint", source, "has no codec in it and none beside it: give the folder with both stages"
        )
    config, kept, notes = read_taming(
        codec_weights, codec_config(tree), source if codec is None else codec.path, image_size=options.image_size
    )
    of_codec = Imported("vqgan", {"vqgan": LazyPart(config, kept)}, notes)
    _check_codec(found.config, of_codec, source)
    is_text, rows = found.config.condition == "text", found.config.text_vocab_size
    tokenizer = mindalle_tokenizer(source.parent, rows) if is_text else class_names(found.config)
    notes = found.notes + notes
    if tokenizer is None and options.tokenizer is None:
        notes.append("no tokenizer beside it (vocabulary and merges): give one by --tokenizer to generate")
    return Imported(
        "mindalle",
        {"transformer": LazyPart(found.config, found.weights), **of_codec.parts},
        notes,
        tokenizer=tokenizer,
        generation=GenerationConfig(top_k=MINDALLE_TOP_K),
    )


def _check_codec(transformer: TransformerConfig, codec: Imported, source: Path) -> None:
    config = codec.parts["vqgan"].config
    theirs = config.codebook_size, config.grid_size  # type: ignore[attr-defined]
    if theirs != (transformer.image_vocab_size, transformer.image_grid_size):
        grid = transformer.image_grid_size
        raise InputError(
            "checkpoint", source,
            f"its transformer has {grid}x{grid} of {transformer.image_vocab_size} tokens, its codec {theirs[1]}x{theirs[1]} "
            f"of {theirs[0]}: give the size of images with --image-size"
        )  # fmt: skip


def _taming(weights: Weights, checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    stated = taming_config(checkpoint.path, options.config)
    config, kept, notes = read_taming(weights, stated, checkpoint.path, image_size=options.image_size)
    return Imported("vqgan", {"vqgan": LazyPart(config, kept)}, notes)


def _discrete_vae(weights: Weights, checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    config, kept, notes = read_discrete_vae(
        weights, checkpoint.codec_hparams or checkpoint.hparams, checkpoint.path, image_size=options.image_size
    )
    return Imported("discrete-vae", {"vqgan": LazyPart(config, kept)}, notes)


def _koclip(checkpoint: Checkpoint) -> Imported:
    config, weights, notes = read_koclip(checkpoint.weights, checkpoint.module, checkpoint.path)
    return Imported("koclip", {"koclip": LazyPart(config, weights)}, notes)


def _openai_file(checkpoint: Checkpoint, options: ImportOptions) -> Imported:
    """One of the two files, with the other one beside it."""
    side = openai_side(checkpoint.weights)
    others = []
    for path in torch_files(checkpoint.path.parent):
        if not path.samefile(checkpoint.path):
            other = open_checkpoint(path)
            if openai_side(other.weights) not in (None, side):
                others.append(other)
    if len(others) != 1:
        missing = "decoder" if side == "encoder" else "encoder"
        raise InputError(
            "checkpoint", checkpoint.path,
            f"is the {side} of an OpenAI dVAE, and {len(others)} files beside it are its {missing}: put the two alone in a "
            "folder, and give that"
        )  # fmt: skip
    return _openai_dvae([checkpoint, others[0]])(options)


def _openai_dvae(checkpoints: list[Checkpoint]) -> _Read:
    sides = {openai_side(checkpoint.weights): checkpoint.weights for checkpoint in checkpoints}
    source = checkpoints[0].path.parent
    if len(sides) != 2:
        raise InputError("source", source, f"holds two times the {', '.join(map(str, sides))} of an OpenAI dVAE")
    return lambda options: _both_sides(sides["encoder"], sides["decoder"], source, options)


def _both_sides(encoder: Weights, decoder: Weights, source: Path, options: ImportOptions) -> Imported:
    config, weights, notes = read_openai_dvae(encoder, decoder, source, image_size=options.image_size)
    return Imported("openai-dvae", {"vqgan": LazyPart(config, weights)}, notes)


def _tokenizer(found: Imported, options: ImportOptions) -> CaptionTokenizer | None:
    """The tokenizer for a transformer.

    Raises:
        InputError: one is given that does not fit, or for a model without a transformer.
    """
    part = found.parts.get("transformer")
    if part is None:
        if options.tokenizer is not None:
            raise InputError("--tokenizer", options.tokenizer, f"a {found.name} has no transformer: leave it out")
        return None
    config = part.config
    assert isinstance(config, TransformerConfig)
    if options.tokenizer is None and found.tokenizer is None:
        return None
    if options.tokenizer is not None and config.condition != "text":
        raise InputError("--tokenizer", options.tokenizer, "is for models that read text: leave it out")
    tokenizer = found.tokenizer if options.tokenizer is None else load_tokenizer(options.tokenizer)
    assert tokenizer is not None
    if tokenizer.vocab_size > config.text_vocab_size:
        raise InputError(
            "--tokenizer", options.tokenizer or "of the model", f"has {tokenizer.vocab_size} entries, the model {config.text_vocab_size}"
        )  # fmt: skip
    check_padding(tokenizer, config, field="--tokenizer", value=options.tokenizer or "of the model")
    return tokenizer


def _card(found: Imported, source: Path) -> str:
    lines = [f"# {found.name}", "", f"Imported from {source.name}, weights as they were."]
    return "\n".join([*lines, "", *(f"- {note}" for note in found.notes)]).rstrip() + "\n"
