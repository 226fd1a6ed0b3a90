"""What a training config takes from other model folders: values that are `auto`, and whether the rest fits.

Reads JSON alone, so that a config that cannot work is refused before torch is imported. Which value follows from what:

    koclip    codec                         <run>/../vqgan/model, or <run>/../dvae/model where that alone is there
              model.image_size              the codec's
              model.text_vocab_size         entries of text.tokenizer; of a trained one: text.vocab_size
              model.text_position_rows      model.text_seq_len + 2
    kodalle   vqgan, koclip                 as `codec`; <run>/../koclip/model
              text.tokenizer                the folder in `koclip`
              model.image_vocab_size        entries of the codec's codebook
              model.image_grid_size         the codec's
              model.text_vocab_size         the KoCLIP's
              model.text_seq_len            the KoCLIP's
              model.text_position_rows      model.text_seq_len + 1
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.config.codec import CodecConfig
from engine.config.run import Run
from engine.config.section import Section
from engine.config.stages import DvaeRun, KoclipRun, KodalleRun, VqganRun
from engine.errors import InputError
from engine.files import read_json

AUTO = "auto"
_CODEC: TypeAdapter[CodecConfig] = TypeAdapter(CodecConfig)
# What may differ from the model that a run starts from: it changes training, not the weights; the text vocabulary may grow.
_FREE = {"attention_dropout", "ff_dropout", "dropout", "commitment_weight", "legacy_commitment"}
_OWN_AUTO = ("resume", "attention")  # a value of their own
# What reads the text; it is new where a model of captions becomes one of classes or of images alone.
_TEXT = {
    "condition",
    "text_vocab_size",
    "text_seq_len",
    "text_position_rows",
    "bos",
    "unique_padding",
    "padding_token",
    "text_embedding_dim",
}
Tree = dict[str, Any]


def resolve_auto(tree: Tree) -> None:
    """Replaces `auto` in a config's tree by what follows from its other values, in place.

    Raises:
        InputError: the folder that a value follows from is not there, or a value that has nothing to follow from.
    """
    stage = tree.get("stage")
    for key, rule in (_KOCLIP if stage == "koclip" else _KODALLE if stage == "kodalle" else {}).items():
        *parents, name = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict) and section.get(name) == AUTO:
            section[name] = rule(tree, key)
    _refuse_other_autos(tree)


def check_folders(run: Run) -> None:
    """Whether a config fits the folders that it names.

    Raises:
        InputError: everything that does not fit, in one message.
    """
    faults: list[tuple[str, object, str]] = []
    if isinstance(run, KodalleRun):
        faults += _kodalle_faults(run)
    elif isinstance(run, KoclipRun) and run.codec is not None:
        faults += _part_faults("codec", run.codec, "vqgan")
    if run.start_from is not None and isinstance(run, (VqganRun, DvaeRun, KoclipRun, KodalleRun)):
        part = {"kodalle": "transformer", "dvae": "vqgan"}.get(run.stage, run.stage)
        faults += _part_faults("start_from", run.start_from, part) or _start_faults(run.model, run.start_from, part)
    if len(faults) == 1:
        raise InputError(*faults[0])
    if faults:
        listed = "; ".join(f"{field} {value}: {remedy}" for field, value, remedy in faults)
        raise InputError("config", f"{len(faults)} faults", listed)


def different_sizes(config: Section, found: Mapping[str, Any]) -> list[str]:
    """Sizes of a config that are not those of the trained model, one text each.

    The text vocabulary may be larger. The images may have another size where convolutions alone see them: a VQGAN's attention
    stands at given resolutions, and a transformer has a row for each position.
    """
    ours = config.model_dump(mode="json")
    families = ours.get("family"), found.get("family", "vqgan")
    if families[0] is not None and families[0] != families[1]:
        return [f"model.family is {families[0]}, there {families[1]}"]
    theirs = type(config).model_validate(dict(found)).model_dump(mode="json")
    different = []
    is_new_text = theirs.get("condition") == "text" != ours.get("condition")
    for name, value in ours.items():
        # Rows of padding come after those of words where each padded position has its own.
        smaller = name == "text_vocab_size" and value >= theirs[name] and not ours.get("unique_padding")
        smaller = smaller and ours.get("condition", "text") == "text"
        resized = name == "image_size" and not ours.get("attention_resolutions")
        is_free = name in _FREE or smaller or resized or (is_new_text and name in _TEXT)
        if value != theirs[name] and not is_free:
            different.append(f"model.{name} is {value}, there {theirs[name]}")
    return different


# ------------------------------------------------------------------------------------------------------------------ auto


def _sibling(*stages: str) -> Callable[[Tree, str], str]:
    """A rule that names the model beside the run: of the first stage that has one, of the first if none has."""

    def rule(tree: Tree, key: str) -> str:
        if not isinstance(tree.get("run"), str):
            raise InputError(key, AUTO, "follows from `run`, which is missing: write it, or a folder")
        models = [Path(tree["run"]).parent / stage / "model" for stage in stages]
        return str(next((model for model in models if model.is_dir()), models[0]))

    return rule


def _of_part(folder_key: str, part: str, value: Callable[[Tree], Any]) -> Callable[[Tree, str], Any]:
    """A rule that reads the config of a part in the folder that another key names."""

    def rule(tree: Tree, key: str) -> Any:
        folder = tree.get(folder_key)
        if not isinstance(folder, str):
            raise InputError(key, AUTO, f"follows from `{folder_key}`, which names no folder: write a number")
        remedy = f"{key} is auto and follows from it: train it first, or write a number"
        config = read_json(Path(folder) / "config.json", field=folder_key, remedy=remedy)
        if part not in config:
            raise InputError(folder_key, folder, f"has no {part}, which {key} follows from: write a number")
        return value(config[part])

    return rule


def _grid(vqgan: Tree) -> int:
    config: CodecConfig = _CODEC.validate_python(vqgan)
    return config.grid_size


def _entries_of_text(tree: Tree, key: str) -> Any:
    text = tree.get("text") or {}
    if text.get("tokenizer") in ("train", "train-bpe"):
        return text.get("vocab_size", 32000)
    entries = tokenizer_entries(Path(str(text.get("tokenizer"))))
    if entries is None:
        raise InputError(key, AUTO, "follows from a folder in text.tokenizer: write a number")
    return entries


def _positions(more: int) -> Callable[[Tree, str], Any]:
    def rule(tree: Tree, key: str) -> Any:
        length = tree["model"].get("text_seq_len", 128)
        return length + more if isinstance(length, int) else length

    return rule


_KOCLIP: dict[str, Callable[[Tree, str], Any]] = {
    "codec": _sibling("vqgan", "dvae"),
    "model.image_size": _of_part("codec", "vqgan", lambda part: part["image_size"]),
    "model.text_vocab_size": _entries_of_text,
    "model.text_position_rows": _positions(2),
}
_KODALLE: dict[str, Callable[[Tree, str], Any]] = {
    "vqgan": _sibling("vqgan", "dvae"),
    "koclip": _sibling("koclip"),
    "text.tokenizer": lambda tree, key: _koclip_folder(tree, key),
    "model.image_vocab_size": _of_part("vqgan", "vqgan", lambda part: part["codebook_size"]),
    "model.image_grid_size": _of_part("vqgan", "vqgan", _grid),
    "model.text_vocab_size": _of_part("koclip", "koclip", lambda part: part["text_vocab_size"]),
    "model.text_seq_len": _of_part("koclip", "koclip", lambda part: part["text_seq_len"]),
    "model.text_position_rows": _positions(1),
}


def _koclip_folder(tree: Tree, key: str) -> str:
    if not isinstance(tree.get("koclip"), str):
        raise InputError(key, AUTO, "follows from `koclip`, which names no folder: write a tokenizer")
    return str(tree["koclip"])


def _refuse_other_autos(tree: Tree) -> None:
    sections = [
        ("", tree),
        *((f"{name}.", tree[name]) for name in ("model", "text") if isinstance(tree.get(name), dict)),
    ]
    for prefix, section in sections:
        for name, value in section.items():
            if value == AUTO and prefix + name not in _OWN_AUTO:
                known = ", ".join(_KOCLIP if tree.get("stage") == "koclip" else _KODALLE)
                raise InputError(prefix + name, AUTO, f"follows from nothing: write a value; what can be auto: {known}")


# ---------------------------------------------------------------------------------------------------------------- faults


def tokenizer_entries(folder: Path) -> int | None:
    """Entries of the tokenizer in a folder; None where there is none to read (a name on the hub, `train`)."""
    tree = _tokenizer(folder)
    if tree is None:
        return None
    vocabulary = tree.get("model", {}).get("vocab", {})
    return len(set(vocabulary) | {token["content"] for token in tree.get("added_tokens", [])})


def _tokenizer(folder: Path) -> Tree | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tree: Tree = json.loads(file.read_text(encoding="utf-8"))
    return {name: value for name, value in tree.items() if name not in ("truncation", "padding")}


def _part_faults(field: str, folder: Path, part: str) -> list[tuple[str, object, str]]:
    file = folder / "config.json"
    if not file.is_file():
        return [(field, folder, "no such model folder: train it first, or give one that is there")]
    config = read_json(file, field=field, remedy="give a folder that training exported")
    held = ", ".join(name for name in ("vqgan", "transformer", "koclip") if name in config) or "nothing"
    return [] if part in config else [(field, folder, f"has no {part} (it holds: {held}): give a folder that has one")]


def _start_faults(config: Section, folder: Path, part: str) -> list[tuple[str, object, str]]:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))[part]
    try:
        different = different_sizes(config, found)
    except ValidationError:
        return []  # reading the folder names what is wrong with it
    return [("start_from", folder, f"has other sizes ({'; '.join(different)}): write its sizes")] if different else []


def _kodalle_faults(run: KodalleRun) -> list[tuple[str, object, str]]:
    faults = _part_faults("vqgan", run.vqgan, "vqgan")
    if not faults:
        vqgan = json.loads((run.vqgan / "config.json").read_text(encoding="utf-8"))["vqgan"]
        codes, grid = vqgan["codebook_size"], _grid(vqgan)
        if codes != run.model.image_vocab_size:
            remedy = f"the codec in {run.vqgan} has {codes} codes: write that number"
            faults.append(("model.image_vocab_size", run.model.image_vocab_size, remedy))
        if grid != run.model.image_grid_size:
            remedy = f"the codec in {run.vqgan} makes {grid} tokens a side: write that number"
            faults.append(("model.image_grid_size", run.model.image_grid_size, remedy))
    tokenizer = _tokenizer(Path(run.text.tokenizer))
    entries = tokenizer_entries(Path(run.text.tokenizer))
    if entries is not None and entries > run.model.text_vocab_size:
        faults.append(
            ("model.text_vocab_size", run.model.text_vocab_size, f"the tokenizer has {entries} entries: raise it")
        )
    if run.koclip is not None:
        missing = _part_faults("koclip", run.koclip, "koclip")
        faults += missing
        theirs = _tokenizer(run.koclip)
        if not missing and tokenizer is not None and theirs is not None and theirs != tokenizer:
            remedy = f"this KoCLIP was trained with another tokenizer: write text.tokenizer={run.koclip}"
            faults.append(("text.tokenizer", run.koclip, remedy))
    return faults
