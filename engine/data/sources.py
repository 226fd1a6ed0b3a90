"""What a source folder holds: the crops that `prepare` will make, and the records set aside already, each with its cause.

Two forms of source: label files with photos (a `LabelFormat` reads them), and plain name.jpg + name.txt. One `Crop` is
one future pair, one `CropJob` one image file with all its crops, so that no photo is decoded twice. Nothing is written here
and no image is opened.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from engine.data.crops import Origin
from engine.data.cut_out import DEFAULT_GROUND, ground_rgb
from engine.data.formats import default_label_format
from engine.data.label_format import (
    Attributes,
    Box,
    LabelFault,
    LabelFormat,
    LabelledObject,
    Outline,
    PhotoLabel,
)
from engine.data.pairs import CaptionFault, Split, find_plain, read_captions, source_sides, split_of
from engine.data.source_files import SourceFolder, scan
from engine.errors import InputError

SourceForm = Literal["labels", "plain"]
# Incomplete labels are normal in large data sets: counted and named, but no fault.
NORMAL = ("object_without_box", "object_without_label", "label_without_object", "no_outline")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The options that decide a prepared folder's content.

    Args:
        image_size: side of the square images written, in pixels.
        image_format: png, or jpg (quality 95: about a quarter of the bytes).
        keep_aspect: pad crops to a square instead of stretching them (published: stretch).
        box_margin: added on each side of a box, or of an outline, as a share of its longer side.
        box_origin: the point that x and y of a box mean.
        scale_boxes: photos were resized after labelling: scale boxes from the label's size to the photo's.
            Without it such photos are set aside as `size_mismatch`. Outlines are scaled with the boxes.
        cut_out: objects without their background, on a plain ground, with the proportions of their outline: a label's
            polygon, or the transparency of a plain source's PNG or WEBP. Objects without one are set aside as `no_outline`.
        ground: `#rrggbb` around cut-outs; None: DEFAULT_GROUND with `cut_out`, else there is none.
        keep_uncut: objects without an outline are used as without `cut_out`.
        label_format: reads the label files and makes the captions; captions of plain sources stay as they are.
        validation_fraction: share of photos held out, unless the source has train/ and validation/.
        seed: of that split.
        max_bad: more than this share of faulty records is an InputError.
        form: of the source; None: detected (labels when there are at least as many .json as .txt files).

    Raises:
        InputError: a value out of its range, or `ground` or `keep_uncut` without `cut_out`.
    """

    image_size: int = 256
    image_format: Literal["png", "jpg"] = "png"
    keep_aspect: bool = False
    box_margin: float = 0.0
    box_origin: Origin = "top_left"
    scale_boxes: bool = False
    cut_out: bool = False
    ground: str | None = None
    keep_uncut: bool = False
    label_format: LabelFormat = field(default_factory=default_label_format)
    validation_fraction: float = 0.05
    seed: int = 42
    max_bad: float = 0.05
    form: SourceForm | None = None

    def __post_init__(self) -> None:
        checks = (
            ("image_size", 8 <= self.image_size <= 4096, "must be from 8 to 4096 pixels"),
            ("box_margin", 0 <= self.box_margin <= 1, "must be from 0 to 1, a share of the box's longer side"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "must be at least 0 and less than 1"),
            ("max_bad", 0 <= self.max_bad <= 1, "must be from 0 to 1, a share of the records"),
        )
        for name, is_fine, remedy in checks:
            if not is_fine:
                raise InputError(name, getattr(self, name), remedy)
        if self.cut_out:
            ground = DEFAULT_GROUND if self.ground is None else self.ground.lower()
            ground_rgb(ground)
            object.__setattr__(self, "ground", ground)  # frozen; the report has the colour that was used
        elif self.ground is not None:
            raise InputError("ground", self.ground, "is the colour around cut-outs: add cut_out, or leave it out")
        elif self.keep_uncut:
            raise InputError(
                "keep_uncut", True, "is about what has no outline to cut out: add cut_out, or leave it out"
            )

    def to_json(self) -> dict[str, Any]:
        """All options, those of the label format among them."""
        tree: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            tree |= value.options() if option.name == "label_format" else {option.name: value}
        return tree


@dataclass(frozen=True)
class Skipped:
    """A record of the source that is not used."""

    record: str
    cause: str
    reason: str

    @property
    def is_bad(self) -> bool:
        return self.cause not in NORMAL


@dataclass(frozen=True)
class Crop:
    """One future pair; `box` and `outline` None mean the whole image."""

    record: str
    key: str
    box: Box | None
    outline: Outline | None
    captions: tuple[str, ...]
    photo: str
    split: Split
    attributes: Attributes


@dataclass(frozen=True)
class CropJob:
    """One image file and its crops; `labelled_size` is (width, height) as the label has it, None in plain sources."""

    image_path: Path
    labelled_size: tuple[int | None, int | None] | None
    crops: tuple[Crop, ...]


@dataclass
class SourceListing:
    """The jobs for a source folder, and the records set aside so far."""

    form: SourceForm
    has_sides: bool
    strict: bool
    jobs: list[CropJob] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """Future pairs and records set aside, as long as no job has been done."""
        return sum(len(job.crops) for job in self.jobs) + len(self.skipped)

    def skip(self, record: str, cause: str, reason: str) -> None:
        item = Skipped(record, cause, reason)
        if self.strict and item.is_bad:
            raise InputError(record, cause, f"{reason} (without strict it is set aside)")
        self.skipped.append(item)


def list_source(source: Path, options: PrepareOptions, *, strict: bool) -> SourceListing:
    """The jobs and the unusable records of `source`.

    Raises:
        InputError: no such folder, nothing in it, or, with `strict`, the first faulty record.
    """
    form = find_form(source) if options.form is None else options.form
    sides = source_sides(source)
    listing = SourceListing(form, bool(sides), strict)
    if form == "labels":
        _list_labels(source, sides, options, listing)
    else:
        _list_plain(source, sides, options, listing)
    return listing


def find_form(source: Path) -> SourceForm:
    """`labels` when there are at least as many .json as .txt files under `source`, else `plain`.

    Raises:
        InputError: no such folder, or neither kind of file in it.
    """
    if not source.is_dir():
        raise InputError("source", source, "no such folder: give one with labels and images, or name.jpg + name.txt")
    if (source / "pairs.jsonl").is_file():
        raise InputError("source", source, "is a prepared folder already: train on it, or give the original source")
    folder = scan(source)
    texts = sum(path.suffix.lower() == ".txt" for path in folder.others)
    if not folder.labels and not texts:
        raise InputError("source", source, "has neither label files (.json) nor captions (.txt): nothing to prepare")
    return "labels" if len(folder.labels) >= texts else "plain"


def pair_key(photo: str, object_key: str) -> str:
    """`<photo>_<object>`; characters of a photo's id other than letters, digits, Hangul, `.` and `-` become `-`."""
    return f"{re.sub(r'[^0-9A-Za-z가-힣.-]', '-', photo).lstrip('.')}_{object_key}"


def _list_labels(source: Path, sides: dict[str, Split], options: PrepareOptions, listing: SourceListing) -> None:
    folder = scan(source)
    claimed: set[Path] = set()
    photos: dict[str, str] = {}
    for label_path in folder.labels:
        record = label_path.relative_to(source).as_posix()
        twin = folder.images.get(label_path.stem, ())  # a faulty label's own photo is not one more record
        try:
            label = options.label_format.read(label_path)
        except LabelFault as fault:
            claimed.update(twin)
            listing.skip(record, fault.defect, fault.remedy)
            continue
        listing.notes.update(label.unknown_values)
        listing.notes.update(label.notes)
        image_path = folder.find_image(label_path, *label.image_names)
        claimed.update(twin if image_path is None else (image_path,))
        if image_path is None:
            listing.skip(record, "label_without_photo", f"no image named {label_path.stem}, {label.photo} or similar")
        elif label.photo in photos:
            listing.skip(record, "duplicate_id", f"photo {label.photo} is labelled by {photos[label.photo]} already")
        elif sides and record.split("/")[0] not in sides:
            listing.skip(record, "outside_split", f"is in none of {', '.join(sides)}")
        else:
            photos[label.photo] = record
            split = sides[record.split("/")[0]] if sides else _split(label.photo, options)
            _list_objects(record, label, image_path, split, options, listing)
    _list_unlabelled(folder, claimed, listing)


def _list_objects(
    record: str, label: PhotoLabel, image_path: Path, split: Split, options: PrepareOptions, listing: SourceListing
) -> None:
    if not label.objects:
        listing.skip(record, "label_without_object", "no object has a label or a box")
    crops = []
    for item in label.objects:
        name = f"{record}: {item.name}"
        fault = _unusable(item, options)
        if fault is None:
            key, outline = pair_key(label.photo, item.key), item.outline if options.cut_out else None
            crops.append(Crop(name, key, item.box, outline, (item.caption,), label.photo, split, item.attributes))
        else:
            listing.skip(name, *fault)
    if crops:
        listing.jobs.append(CropJob(image_path, (label.width, label.height), tuple(crops)))


def _unusable(item: LabelledObject, options: PrepareOptions) -> tuple[str, str] | None:
    """Cause and reason why an object cannot be a pair, as far as its label tells; None if it can."""
    is_cut = options.cut_out and item.outline is not None
    if item.box_fault:
        return "bad_box", item.box_fault
    if options.cut_out and item.outline_fault:
        return "bad_outline", item.outline_fault
    if item.box is None and not is_cut:
        return "object_without_box", "has no box to crop"
    if not item.attributes:
        return "object_without_label", "has no labels for a caption"
    if options.cut_out and not is_cut and not options.keep_uncut:
        return "no_outline", "has no outline to cut it out along (keep_uncut takes its box)"
    return None


def _list_unlabelled(folder: SourceFolder, claimed: set[Path], listing: SourceListing) -> None:
    for paths in folder.images.values():
        for path in paths:
            if path not in claimed:
                listing.skip(path.relative_to(folder.root).as_posix(), "photo_without_label", "no label file names it")
    for path in folder.others:
        listing.notes[f"ignored files: *{path.suffix}"] += 1


def _list_plain(source: Path, sides: dict[str, Split], options: PrepareOptions, listing: SourceListing) -> None:
    matched, unmatched = find_plain(source)
    for name, cause, reason in unmatched:
        listing.skip(name, cause, reason)
    for key, image_path, text_path in matched:
        record = image_path.relative_to(source).as_posix()
        photo = PurePosixPath(key).name
        if sides and record.split("/")[0] not in sides:
            listing.skip(record, "outside_split", f"is in none of {', '.join(sides)}")
            continue
        try:
            captions = read_captions(text_path)
        except CaptionFault as fault:
            listing.skip(record, fault.defect, f"{text_path.name} {fault.remedy}")
            continue
        split = sides[record.split("/")[0]] if sides else _split(photo, options)
        listing.jobs.append(CropJob(image_path, None, (Crop(record, key, None, None, captions, photo, split, {}),)))


def _split(photo: str, options: PrepareOptions) -> Split:
    return split_of(photo, options.validation_fraction, options.seed)
