"""What a source folder holds: the crops that `prepare` will make, and the records set aside already, each with its cause.

Two forms of source: label files with photos (a `LabelFormat` reads them), and plain name.jpg + name.txt. `list_photos` looks
at names alone, `read_photo` at the texts of one image; one `Crop` is one future pair. Nothing is written here and no image is
opened.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from engine.data.crops import Origin
from engine.data.cut_out import crosses_itself
from engine.data.formats import default_label_format
from engine.data.ground import DEFAULT_GROUND, ground_rgb
from engine.data.label_format import (
    Attributes,
    Box,
    LabelFault,
    LabelFormat,
    LabelledObject,
    Outline,
    say_the_same,
)
from engine.data.names import readable_name
from engine.data.pair_keys import base_name
from engine.data.pairing import Pairing, pair_files
from engine.data.pairs import CaptionFault, Split, read_captions, split_of
from engine.data.plain_folder import find_plain
from engine.data.set_aside import Finds, Skipped
from engine.data.source_files import (
    UNREAD_SUFFIXES,
    Side,
    SourceFolder,
    SourceForm,
    display_sides,
    find_form,
    scan,
    side_of,
    source_sides,
    stem_of,
    suffix_of,
    unpack_remedy,
)
from engine.errors import InputError
from engine.text import MAX_CHARACTERS


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
class Crop:
    """One future pair.

    Args:
        record: for reports.
        text: the label or caption file, under the source.
        base, object_key: parts of the key; `base` is the photo's id as a file name, or a plain source's key.
        box, outline: None mean the whole image.
        labelled_size: (width, height) as the label has it; None in plain sources.
    """

    record: str
    text: str
    base: str
    object_key: str
    box: Box | None
    outline: Outline | None
    captions: tuple[str, ...]
    photo: str
    split: Split
    attributes: Attributes
    labelled_size: tuple[int | None, int | None] | None

    @property
    def key(self) -> str:
        """Of the pair, unless another photo has the same `base`."""
        return f"{self.base}_{self.object_key}" if self.object_key else self.base


@dataclass(frozen=True)
class CropJob:
    """One image file and its crops."""

    image_path: Path
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class SourcePhoto:
    """One image file and what describes it: label files, or one caption file; paths under the source."""

    image: str
    texts: tuple[str, ...]
    key: str = ""  # of a plain source


@dataclass
class PhotoListing:
    """What the names in a source folder tell; `found` is what is used all the same, but worth knowing."""

    source: Path
    form: SourceForm
    sides: dict[str, Side]
    photos: list[SourcePhoto] = field(default_factory=list)
    found: Finds = field(default_factory=Finds)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass
class ReadPhoto:
    """What the texts of one image tell: future pairs, and records set aside."""

    photo: SourcePhoto
    crops: list[Crop] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)  # of the labels that could be read
    found: list[tuple[str, str, str]] = field(default_factory=list)  # used, but worth knowing: kind, record, reason


@dataclass
class SourceListing:
    """All of a source folder in memory: the jobs, and the records set aside."""

    form: SourceForm
    has_sides: bool
    jobs: list[CropJob] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def list_source(source: Path, options: PrepareOptions, *, strict: bool) -> SourceListing:
    """The jobs and the unusable records of `source`, all in memory.

    Raises:
        InputError: no such folder, nothing in it, or, with `strict`, the first faulty record.
    """
    skipped: list[Skipped] = []

    def set_aside(item: Skipped) -> None:
        if strict and item.is_bad:
            raise InputError(item.record, item.cause, f"{item.reason} (without strict it is set aside)")
        skipped.append(item)

    photos = list_photos(source, options, set_aside)
    listing = SourceListing(photos.form, bool(photos.sides), skipped=skipped)
    for photo in photos.photos:
        read = read_photo(photo, source, photos.sides, options)
        for item in read.skipped:
            set_aside(item)
        if read.crops:
            listing.jobs.append(CropJob(source / photo.image, tuple(read.crops)))
    return listing


def list_photos(source: Path, options: PrepareOptions, set_aside: Callable[[Skipped], None]) -> PhotoListing:
    """The images of `source` with the texts that describe them, in the order of these.

    Args:
        set_aside: gets each file that is left over.

    Raises:
        InputError: no such folder, or nothing in it.
    """
    form = find_form(source) if options.form is None else options.form
    listing = PhotoListing(source, form, source_sides(source))
    if form == "labels":
        _list_labels(listing, options, set_aside)
    else:
        _list_plain(listing, set_aside)
    return listing


def _list_labels(listing: PhotoListing, options: PrepareOptions, set_aside: Callable[[Skipped], None]) -> None:
    folder = scan(listing.source)
    faults: dict[str, LabelFault] = {}

    def stated_names(label: str) -> Sequence[str]:
        try:
            return options.label_format.read(listing.source / label).image_names
        except LabelFault as fault:
            faults[label] = fault
            return ()

    pairing = pair_files(folder, stated_names)
    listing.photos = [SourcePhoto(image, tuple(labels)) for image, labels in pairing.photos()]
    for label in folder.labels:
        if label not in pairing.image_of:
            set_aside(_without_image(label, faults.get(label), pairing.refused.get(label), listing.source, options))
    images = set(pairing.image_of.values())
    for image in folder.images:
        if image in pairing.alike:
            reason = f"has the same name as {readable_name(pairing.alike[image])}, which the label takes"
            set_aside(Skipped(readable_name(image), "equal_stems", reason))
        elif image not in images:
            set_aside(Skipped(readable_name(image), "photo_without_label", "no label file is found for it"))
    _note_files(folder, pairing, listing)


def _without_image(
    label: str, fault: LabelFault | None, refused: str | None, source: Path, options: PrepareOptions
) -> Skipped:
    record = readable_name(label)
    if fault is not None:
        return Skipped(record, fault.defect, fault.remedy)
    if refused is None:
        return Skipped(record, "label_without_photo", "no image is found for it")
    other = readable_name(refused)
    if say_the_same(source / label, source / refused, options.label_format):
        return Skipped(record, "duplicate_label", f"says what {other} says, whose image it states")
    return Skipped(record, "label_without_photo", f"the image that it states has a label file of its own, {other}")


def _note_files(folder: SourceFolder, pairing: Pairing, listing: PhotoListing) -> None:
    for path in folder.archives:
        listing.found.add("archive_not_read", readable_name(path), f"if it is not unpacked, {unpack_remedy(path)}")
    for label in pairing.stated:
        image = readable_name(pairing.image_of[label])
        listing.found.add("stated_name", readable_name(label), f"states the name of its image, {image}")
    first: dict[str, str] = {}
    for image in pairing.image_of.values():
        other = first.setdefault(stem_of(image), image)
        if other != image:
            listing.found.add("repeated_name", readable_name(image), f"has the name of {readable_name(other)} too")
    listing.notes.update(f"image files: *{path[path.rindex('.') :]}" for path in folder.images)
    for path in folder.others:
        listing.notes[f"ignored files: *{suffix_of(path)}"] += 1
        if suffix_of(path) in UNREAD_SUFFIXES:
            listing.found.add("unread_format", readable_name(path), "is not read: convert it to JPEG or PNG")


def _list_plain(listing: PhotoListing, set_aside: Callable[[Skipped], None]) -> None:
    matched, unmatched = find_plain(listing.source)
    for name, cause, reason in unmatched:
        set_aside(Skipped(name, cause, reason))
    for pair in matched:
        image, text = (path.relative_to(listing.source).as_posix() for path in (pair.image, pair.text))
        listing.photos.append(SourcePhoto(image, (text,), pair.key))


def read_photo(photo: SourcePhoto, source: Path, sides: dict[str, Side], options: PrepareOptions) -> ReadPhoto:
    """Reads the label files or the caption file of one image."""
    read = ReadPhoto(photo)
    for text in photo.texts:
        # plain sources are reported by image, labelled ones by label
        record = readable_name(photo.image if suffix_of(text) == ".txt" else text)
        if sides and side_of(text, sides) is None:
            read.skipped.append(Skipped(record, "outside_split", f"is in none of {display_sides(sides)}"))
        elif suffix_of(text) == ".txt":
            _read_captions(record, text, source, sides, options, read)
        else:
            _read_label(record, text, source, sides, options, read)
    return read


def _read_captions(
    record: str, text: str, source: Path, sides: dict[str, Side], options: PrepareOptions, read: ReadPhoto
) -> None:
    try:
        captions = read_captions(source / text)
    except CaptionFault as fault:
        read.skipped.append(Skipped(record, fault.defect, f"{readable_name(PurePosixPath(text).name)} {fault.remedy}"))
        return
    key = read.photo.key
    photo = PurePosixPath(key).name
    split = side_of(text, sides) or split_of(photo, options.validation_fraction, options.seed)
    read.crops.append(Crop(record, text, key, "", None, None, captions, photo, split, {}, None))


def _read_label(
    record: str, text: str, source: Path, sides: dict[str, Side], options: PrepareOptions, read: ReadPhoto
) -> None:
    try:
        label = options.label_format.read(source / text)
    except LabelFault as fault:
        read.skipped.append(Skipped(record, fault.defect, fault.remedy))
        return
    read.notes.update(label.unknown_values)
    read.notes.update(label.notes)
    read.ids.append(label.photo)
    if not label.objects:
        read.skipped.append(Skipped(record, "label_without_object", "no object has a label or a box"))
    split = side_of(text, sides) or split_of(label.photo, options.validation_fraction, options.seed)
    base, size = base_name(label.photo), (label.width, label.height)
    for item in label.objects:
        name = f"{record}: {item.name}"
        reason = _unusable(item, options)
        if reason is not None:
            read.skipped.append(Skipped(name, *reason))
            continue
        outline = item.outline if options.cut_out else None
        if outline is not None and crosses_itself(outline):
            read.found.append(
                ("crossed_outline", name, "the outline crosses itself: it is filled by the even-odd rule")
            )
        read.crops.append(
            Crop(
                name,
                text,
                base,
                item.key,
                item.box,
                outline,
                (item.caption,),
                label.photo,
                split,
                item.attributes,
                size,
            )
        )


def _unusable(item: LabelledObject, options: PrepareOptions) -> tuple[str, str] | None:
    """Cause and reason why an object cannot be a pair, as far as its label tells; None if it can."""
    is_cut = options.cut_out and item.outline is not None
    if item.box_fault:
        return "bad_box", item.box_fault
    if options.cut_out and item.outline_fault:
        return "bad_outline", item.outline_fault
    if item.box is None and not is_cut:
        return "object_without_box", "has no box to crop"
    if not item.attributes or not item.caption:
        return "object_without_label", "has no labels for a caption"
    if len(item.caption) > MAX_CHARACTERS:
        return "too_long", f"its caption has {len(item.caption):,} characters: shorten its values"
    if options.cut_out and not is_cut and not options.keep_uncut:
        return "no_outline", "has no outline to cut it out along (keep_uncut takes its box)"
    return None
