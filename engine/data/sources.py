"""What a source folder holds: the work of `prepare` as a list, and what is out of it already, each with its cause.

Two forms of source: K-Fashion labels with photos, and plain name.jpg + name.txt. One `Crop` is one pair to be, one
`Job` one image file with all its crops, so that no photo is decoded twice. Nothing is written here and no image opened.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from engine.data.crops import Origin
from engine.data.kfashion.captions import ListValues, caption, ordered
from engine.data.kfashion.labels import (
    KIND_NAMES,
    Attributes,
    Box,
    Garment,
    Label,
    LabelFault,
    LabelFolder,
    find_image,
    read_label,
    scan,
    unknown_values,
)
from engine.data.pairs import CaptionFault, Split, find_plain, read_captions, source_sides, split_of
from engine.errors import InputError

Form = Literal["labels", "plain"]
# What K-Fashion's incomplete labels bring along by nature: counted and named, but no fault.
NORMAL = ("garment_without_box", "garment_without_label", "label_without_garment")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the prepared folder's content.

    Args:
        image_size: side of the square images written, in pixels.
        image_format: png, or jpg (quality 95: about a quarter of the bytes).
        keep_aspect: pad crops to a square instead of stretching them (published: stretch).
        box_margin: added on each side of a box, as a share of its longer side.
        box_origin: what X좌표, Y좌표 mean.
        scale_boxes: photos were resized after labelling: scale boxes from the label's size to the photo's.
            Without it such photos are set aside as `size_mismatch`.
        caption_scope: `garment` tells of the cropped garment alone, `photo` of all in the photo.
        style: keep sentences on 스타일 (KoDALLE trains without). Captions of plain sources stay as they are.
        subject_once: tell `상의에서` once.
        list_values: all values of 디테일, 소재, 프린트, or the first.
        validation_fraction: share of photos held out, unless the source has train/ and validation/.
        seed: of that split.
        max_bad: more than this share of faulty records is an InputError.
        form: of the source; None finds out (labels when there are at least as many .json as .txt files).

    Raises:
        InputError: a value out of its range.
    """

    image_size: int = 256
    image_format: Literal["png", "jpg"] = "png"
    keep_aspect: bool = False
    box_margin: float = 0.0
    box_origin: Origin = "top_left"
    scale_boxes: bool = False
    caption_scope: Literal["garment", "photo"] = "garment"
    style: bool = False
    subject_once: bool = False
    list_values: ListValues = "all"
    validation_fraction: float = 0.05
    seed: int = 42
    max_bad: float = 0.05
    form: Form | None = None

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
    """One pair to be: `box` None means the whole image."""

    record: str
    key: str
    box: Box | None
    captions: tuple[str, ...]
    photo: str
    split: Split
    attributes: Attributes


@dataclass(frozen=True)
class Job:
    """One image file and what is cut from it; `labelled_size` is (width, height) as the label has it."""

    image_path: Path
    labelled_size: tuple[int | None, int | None]
    crops: tuple[Crop, ...]


@dataclass
class Plan:
    """What the listing of the source gives: the work, and what is out of it already."""

    form: Form
    has_sides: bool
    strict: bool
    jobs: list[Job] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """Pairs to be and records set aside, as long as no job has been worked on."""
        return sum(len(job.crops) for job in self.jobs) + len(self.skipped)

    def skip(self, record: str, cause: str, reason: str) -> None:
        item = Skipped(record, cause, reason)
        if self.strict and item.is_bad:
            raise InputError(record, cause, f"{reason} (without strict it would be set aside)")
        self.skipped.append(item)


def plan_source(source: Path, options: PrepareOptions, *, strict: bool) -> Plan:
    """Lists what is to be done for `source`.

    Raises:
        InputError: no such folder, nothing in it, or, with `strict`, the first faulty record.
    """
    form = find_form(source) if options.form is None else options.form
    sides = source_sides(source)
    plan = Plan(form, bool(sides), strict)
    if form == "labels":
        _plan_labels(source, sides, options, plan)
    else:
        _plan_plain(source, sides, options, plan)
    return plan


def find_form(source: Path) -> Form:
    """`labels` when there are at least as many .json as .txt files under `source`, else `plain`.

    Raises:
        InputError: no such folder, or neither sort of file in it.
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


def ascii_key(photo: str, garment: Garment) -> str:
    """`<photo>_<outer|bottom|onepiece|top>_<index>`; what is no plain character in a photo's id becomes `-`."""
    return f"{re.sub(r'[^0-9A-Za-z가-힣.-]', '-', photo).lstrip('.')}_{KIND_NAMES[garment.kind]}_{garment.index}"


def _plan_labels(source: Path, sides: dict[str, Split], options: PrepareOptions, plan: Plan) -> None:
    folder = scan(source)
    claimed: set[Path] = set()
    photos: dict[str, str] = {}
    for label_path in folder.labels:
        record = label_path.relative_to(source).as_posix()
        twin = folder.images.get(label_path.stem, ())  # a faulty label's own photo is not one more record
        try:
            label = read_label(label_path)
        except LabelFault as fault:
            claimed.update(twin)
            plan.skip(record, fault.kind, fault.remedy)
            continue
        plan.notes.update(unknown_values(label))
        plan.notes.update(label.notes)
        image_path = find_image(folder, label_path, label)
        claimed.update(twin if image_path is None else (image_path,))
        if image_path is None:
            plan.skip(record, "label_without_photo", f"no image named {label_path.stem}, {label.photo} or alike")
        elif label.photo in photos:
            plan.skip(record, "duplicate_id", f"photo {label.photo} is labelled by {photos[label.photo]} already")
        elif sides and record.split("/")[0] not in sides:
            plan.skip(record, "outside_split", f"is in none of {', '.join(sides)}")
        else:
            photos[label.photo] = record
            split = sides[record.split("/")[0]] if sides else _split(label.photo, options)
            _plan_garments(record, label, image_path, split, options, plan)
    _plan_unlabelled(folder, claimed, plan)


def _plan_garments(
    record: str, label: Label, image_path: Path, split: Split, options: PrepareOptions, plan: Plan
) -> None:
    if not label.garments:
        plan.skip(record, "label_without_garment", "no garment has a label or a box")
    crops = []
    for garment in label.garments:
        name = f"{record}: {garment.name}"
        if garment.box_fault:
            plan.skip(name, "bad_box", garment.box_fault)
        elif garment.box is None:
            plan.skip(name, "garment_without_box", "has labels, but no box to crop")
        elif not garment.attributes:
            plan.skip(name, "garment_without_label", "has a box, but nothing to say in a caption")
        else:
            told = caption(
                label,
                [garment] if options.caption_scope == "garment" else None,
                style=options.style,
                subject_once=options.subject_once,
                list_values=options.list_values,
            )
            attributes = {"garment": garment.kind, **ordered(garment.attributes)}
            key = ascii_key(label.photo, garment)
            crops.append(Crop(name, key, garment.box, (told,), label.photo, split, attributes))
    if crops:
        plan.jobs.append(Job(image_path, (label.width, label.height), tuple(crops)))


def _plan_unlabelled(folder: LabelFolder, claimed: set[Path], plan: Plan) -> None:
    for paths in folder.images.values():
        for path in paths:
            if path not in claimed:
                plan.skip(path.relative_to(folder.root).as_posix(), "photo_without_label", "no label file names it")
    for path in folder.others:
        plan.notes[f"files passed over: *{path.suffix}"] += 1


def _plan_plain(source: Path, sides: dict[str, Split], options: PrepareOptions, plan: Plan) -> None:
    matched, left_out = find_plain(source)
    for name, cause, reason in left_out:
        plan.skip(name, cause, reason)
    for key, image_path, text_path in matched:
        record = image_path.relative_to(source).as_posix()
        photo = PurePosixPath(key).name
        if sides and record.split("/")[0] not in sides:
            plan.skip(record, "outside_split", f"is in none of {', '.join(sides)}")
            continue
        try:
            captions = read_captions(text_path)
        except CaptionFault as fault:
            plan.skip(record, fault.kind, f"{text_path.name} {fault.remedy}")
            continue
        split = sides[record.split("/")[0]] if sides else _split(photo, options)
        plan.jobs.append(Job(image_path, (None, None), (Crop(record, key, None, captions, photo, split, {}),)))


def _split(photo: str, options: PrepareOptions) -> Split:
    return split_of(photo, options.validation_fraction, options.seed)
