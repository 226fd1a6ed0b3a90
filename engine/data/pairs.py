"""(image, caption) pairs: what every training stage reads.

Owns the in-memory list of pairs, its train/validation split, the class-balancing weights and the reading of one
image. Two forms on disk give the same `Pairs`: a prepared folder (`pairs.jsonl`, written by `kodalle data prepare`,
which carries its own split) and a plain folder of name.jpg + name.txt (split here, by a hash of the stem).

Order is sorted by key and the split is a pure function of (seed, photo), so two processes, or two machines, agree
without communicating. The ancestors ordered pairs by `list(set(...))`, which differs between processes, and let equal stems
of two folders overwrite each other; here a key is the path under the folder.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from engine.data.caption_guide import CaptionGuide, example_captions, training_words
from engine.data.clean_json import read_clean_json
from engine.data.crops import ImageFault, check_image, crop_and_resize, open_image
from engine.data.formats import grammar_of
from engine.data.ground import ground_rgb
from engine.data.label_format import Attributes
from engine.data.plain_folder import find_plain
from engine.data.source_files import (
    CONVERT,
    display_sides,
    side_of,
    source_sides,
)
from engine.errors import InputError, printable
from engine.files import read_json
from engine.progress import ProgressBar
from engine.text import TextDefect, TextFault, clean_text

FORMAT_VERSION = 1
REPORT_FILE = "report.json"
_MAX_CAPTION_BYTES = 1_000_000
_MANY = 1000  # images; from there on decoding them takes long enough for a progress bar
MAX_SET_ASIDE = 0.05  # share of a plain folder's records that may be unusable before training refuses to start

Split = Literal["train", "validation"]
CaptionDefect = Literal["unreadable_caption", "wrong_encoding", "empty_caption"] | TextDefect

_log = logging.getLogger(__name__)


class CaptionFault(InputError):
    """A caption file that cannot be used; `defect` is one word for reports, `remedy` says what is wrong with it."""

    def __init__(self, defect: CaptionDefect, path: Path, remedy: str) -> None:
        self.defect: CaptionDefect = defect
        self.path = path
        super().__init__("caption", path, remedy)


@dataclass(frozen=True)
class Pair:
    """One image with its caption(s). Crops of one `photo` stay on one side of the split."""

    key: str
    image_path: Path
    captions: tuple[str, ...]
    photo: str
    split: Split
    attributes: Attributes = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder, sorted by key, and its unusable records as (name, reason).

    `ground` is the colour around cut-outs, `#rrggbb`; None for other images.
    """

    all: tuple[Pair, ...]
    set_aside: tuple[tuple[str, str], ...] = ()
    ground: str | None = None

    @cached_property
    def train(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.all if pair.split == "train")

    @cached_property
    def validation(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.all if pair.split == "validation")

    def __len__(self) -> int:
        return len(self.all)


def known_attributes(pairs: Sequence[Pair]) -> dict[str, dict[str, list[str]]]:
    """What the captions state: subject to attribute to values, the commonest first; {} without a caption grammar."""
    grammar = grammar_of(pair.captions[0] for pair in pairs)
    if grammar is None:
        return {}
    counts: dict[str, dict[str, Counter[str]]] = {}
    for pair in pairs:
        subject = pair.attributes.get(grammar.subject_attribute)
        if not isinstance(subject, str):
            continue
        for name, value in pair.attributes.items():
            if name != grammar.subject_attribute:
                values = [value] if isinstance(value, str) else value
                counts.setdefault(subject, {}).setdefault(name, Counter()).update(values)
    return {
        subject: {name: sorted(found, key=lambda value: (-found[value], value)) for name, found in sorted(own.items())}
        for subject, own in sorted(counts.items())
    }


def caption_guide(pairs: Sequence[Pair]) -> CaptionGuide:
    """How to write captions like those of the pairs: examples, words, and where they follow a grammar, attributes and form."""
    captions = [caption for pair in pairs for caption in pair.captions]
    grammar = grammar_of(captions)
    return CaptionGuide(
        examples=example_captions(captions),
        attributes=known_attributes(pairs),
        form=None if grammar is None else grammar.form(),
        synonyms={} if grammar is None else grammar.synonyms(),
        words=training_words(captions),
    )


def load_pairs(folder: Path, *, validation_fraction: float = 0.05, seed: int = 42) -> Pairs:
    """Reads a prepared folder or a plain folder of name.jpg + name.txt (recursive).

    Args:
        folder: holds pairs.jsonl, or images with captions beside them.
        validation_fraction: share of photos held out, for plain folders; a prepared folder has its split, and so has
            a plain one with train/ and validation/ in it.
        seed: of the plain folder's split.

    Raises:
        InputError: no such folder, no pairs, no training pairs, a broken line, a missing image, or more than 5 % of a
            plain folder's files unusable (fewer are set aside: named in `Pairs.set_aside` and in one warning).
    """
    if not folder.is_dir():
        raise InputError("pairs", folder, "no such folder: give one made by `kodalle data prepare`, or name.jpg + .txt")
    if (folder / "pairs.jsonl").is_file():
        pairs = _load_prepared(folder)
    else:
        pairs = _load_plain(folder, validation_fraction, seed)
    if not pairs.all:
        raise InputError("pairs", folder, "holds no pairs: it needs pairs.jsonl, or images with name.txt beside them")
    if not pairs.train:
        raise InputError("pairs", folder, f"all {len(pairs)} pairs are for validation, none is left to train on")
    return pairs


def load_image(pair: Pair, image_size: int) -> npt.NDArray[np.uint8]:
    """The pair's image as (image_size, image_size, 3) uint8; stretched, antialiased, if stored in another size.

    Raises:
        ImageFault: (an InputError) unreadable, truncated or oversize; names the file.
    """
    image = crop_and_resize(open_image(pair.image_path, for_size=image_size), None, image_size)
    return np.array(image, dtype=np.uint8)  # a copy: the caller may write to it


def balance_weights(pairs: Sequence[Pair], attribute: str, *, inverse: Literal["sqrt", "full"] = "sqrt") -> list[float]:
    """Resampling weights that favour rare values of an attribute; their mean is 1.

    Args:
        pairs: at least one.
        attribute: name of an attribute; pairs without it are one more class.
        inverse: `sqrt` weighs a pair 1 / sqrt(n) for a value seen n times (a class is sampled in proportion to
            sqrt(n)); `full` weighs it 1 / n (all classes equally often).

    Raises:
        InputError: no pair has the attribute (a typing error would otherwise weigh all pairs alike, unnoticed).
    """
    values = [_value_of(pair, attribute) for pair in pairs]
    if not any(values):
        known = sorted({name for pair in pairs for name in pair.attributes})
        raise InputError("balance", attribute, f"no pair has this attribute; known are: {', '.join(known) or 'none'}")
    counts = Counter(values)
    power = 0.5 if inverse == "sqrt" else 1.0
    weights = [counts[value] ** -power for value in values]
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]


def split_of(photo: str, validation_fraction: float, seed: int) -> Split:
    """The side of a photo: a pure function, uniform over photos (first 8 bytes of SHA-256)."""
    digest = hashlib.sha256(f"{seed}:{photo}".encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


def read_captions(path: Path) -> tuple[str, ...]:
    """The lines of a caption file (UTF-8, with or without a byte order mark) in which something is visible, in normal form.

    Raises:
        CaptionFault: (an InputError) unreadable, not UTF-8, with characters that no text has, too long, or empty.
    """
    try:
        if path.stat().st_size > _MAX_CAPTION_BYTES:
            raise CaptionFault("too_long", path, f"has more than {_MAX_CAPTION_BYTES:,} bytes: it is no caption")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionFault("wrong_encoding", path, f"is not UTF-8: convert it ({CONVERT})") from error
    except OSError as error:
        raise CaptionFault("unreadable_caption", path, f"cannot be read: {error.strerror}") from error
    try:
        # not splitlines(): it breaks captions at U+2028 and other characters that are no line ends in a text file
        captions = tuple(filter(None, map(clean_text, text.split("\n"))))
    except TextFault as fault:
        raise CaptionFault(fault.defect, path, fault.remedy) from fault
    if not captions:
        raise CaptionFault("empty_caption", path, "is empty: write a caption into it")
    return captions


def _value_of(pair: Pair, attribute: str) -> str:
    value = pair.attributes.get(attribute, "")
    return value if isinstance(value, str) else ", ".join(value)


def _load_plain(folder: Path, validation_fraction: float, seed: int) -> Pairs:
    matched, unmatched = find_plain(folder)
    set_aside = [(name, reason) for name, _, reason in unmatched]
    pairs = []
    sides = source_sides(folder)
    for found, fault in zip(matched, _image_faults([each.image for each in matched]), strict=True):
        photo, side = PurePosixPath(found.key).name, side_of(found.text.relative_to(folder).as_posix(), sides)
        if sides and side is None:
            set_aside.append((_name(found.text, folder), f"is in none of {display_sides(sides)}"))
            continue
        if fault is not None:
            set_aside.append((_name(found.image, folder), fault.remedy))
            continue
        try:
            captions = read_captions(found.text)
        except InputError as error:
            set_aside.append((_name(found.text, folder), error.remedy))
            continue
        split = side or split_of(photo, validation_fraction, seed)
        pairs.append(Pair(found.key, found.image, captions, photo, split))
    if set_aside:
        name, reason = set_aside[0]
        summary = f"{len(set_aside)} of {len(pairs) + len(set_aside)} records set aside, the first: {name}: {reason}"
        if len(set_aside) > MAX_SET_ASIDE * (len(pairs) + len(set_aside)):
            raise InputError("pairs", folder, f"{summary}; run `kodalle data check` on it and repair or remove them")
        _log.warning("%s: %s", folder, printable(summary))
    return Pairs(tuple(pairs), tuple(set_aside))


def _image_faults(paths: Sequence[Path]) -> Iterator[ImageFault | None]:
    """What is wrong with each image: found here, and not at the step that meets it."""

    def fault_of(path: Path) -> ImageFault | None:
        try:
            check_image(path)
        except ImageFault as fault:
            return fault
        return None

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # decoding leaves Python's lock
        ProgressBar("checking images", total=len(paths), enabled=len(paths) > _MANY) as bar,
    ):
        for number, fault in enumerate(pool.map(fault_of, paths), 1):
            bar.update(number)
            yield fault


def _name(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix())


def _load_prepared(folder: Path) -> Pairs:
    file = folder / "pairs.jsonl"
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError("pairs", file, f"is not UTF-8 ({error}): prepare the folder again") from error
    listings: dict[Path, set[str]] = {}
    pairs: dict[str, Pair] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        pair = _read_line(line, folder, f"{file}:{number}")
        if pair.key in pairs:
            raise InputError("pairs", f"{file}:{number}", f"key {pair.key} occurs twice: prepare the folder again")
        # one listing a folder instead of one stat() an image: a million round trips on network storage
        parent = pair.image_path.parent
        if parent not in listings:
            listings[parent] = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
        if pair.image_path.name not in listings[parent]:
            raise InputError("pairs", pair.image_path, f"no such file, named in {file}:{number}: prepare it again")
        pairs[pair.key] = pair
    return Pairs(tuple(pairs[key] for key in sorted(pairs)), ground=_ground(folder / REPORT_FILE))


def _ground(report: Path) -> str | None:
    """The ground that a prepared folder's report names; older folders, and ones made by hand, have none."""
    if not report.is_file():
        return None
    tree = read_json(report, field="pairs", remedy="prepare the folder again")
    options = tree.get("options") if isinstance(tree, dict) else None
    ground = options.get("ground") if isinstance(options, dict) else None
    if ground is not None:
        ground_rgb(ground)
    return ground


def _read_line(line: str, folder: Path, where: str) -> Pair:
    def bad(reason: str) -> InputError:
        return InputError("pairs", where, f"{reason}: prepare the folder again")

    try:
        record = read_clean_json(line, file_name="image")
    except TextFault as fault:
        raise bad(f"{fault.value} {fault.remedy}") from fault
    except ValueError as error:
        raise bad(f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise bad("is not a JSON object")
    for name in ("key", "image", "caption", "photo", "split"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise bad(f"has no text under `{name}`")
    if record["split"] not in ("train", "validation"):
        raise bad(f"split is {record['split']!r}, not train or validation")
    image = PurePosixPath(record["image"])
    if image.is_absolute() or ".." in image.parts:
        raise bad(f"image {record['image']!r} points outside the folder")
    texts = record.get("captions", [record["caption"]])
    if not _is_texts(texts) or not texts or texts[0] != record["caption"]:
        raise bad("captions is not a list of texts that starts with caption")
    try:
        captions = tuple(map(clean_text, texts))
    except TextFault as fault:
        raise bad(f"{fault.value} {fault.remedy}") from fault
    if not all(captions):
        raise bad("has a caption in which nothing is visible")
    attributes: Any = record.get("attributes", {})
    if not isinstance(attributes, dict) or not all(isinstance(v, str) or _is_texts(v) for v in attributes.values()):
        raise bad("attributes is not a flat object of texts and lists of texts")
    split = cast(Split, record["split"])
    return Pair(record["key"], folder / image, captions, record["photo"], split, attributes)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
