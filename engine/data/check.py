"""`kodalle data check`: the defects of a source folder, named before a training run meets them.

Owns the list of defects (DEFECTS). Each is one that an ancestor's loader passed over in silence: it read only text files
whose name ends in a digit, let equal stems of two folders overwrite each other (a wrong caption on an image), dropped
unmatched files, replaced a corrupt image by its neighbour. Every image is decoded to its last row, because nothing else
shows a truncated one.

Errors are records that cannot be used as they are (`kodalle data prepare` sets them aside); warnings can be used, but look
odd. Faults of outlines are warnings: only `--cut-out` reads outlines, and sets such objects aside.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.data.crops import IMAGE_FORMATS, ImageFault, open_layered, pixel_box
from engine.data.cut_out import OutlineFault, crosses_itself, fit_outline, visible_layer
from engine.data.duplicates import GroupedCrop, judge_group
from engine.data.formats import default_label_format
from engine.data.label_format import LabelFault, LabelFormat, PhotoLabel, say_the_same
from engine.data.names import readable_name
from engine.data.orientation import label_frame, size_difference
from engine.data.pairing import pair_files
from engine.data.pairs import CaptionFault, load_pairs, read_captions
from engine.data.plain_folder import find_plain
from engine.data.source_files import (
    UNREAD_SUFFIXES,
    SourceFolder,
    SourceForm,
    find_form,
    scan,
    side_of,
    source_sides,
    stem_of,
    suffix_of,
)
from engine.data.sources import Crop
from engine.data.workers import ordered_map
from engine.errors import BYTES, InputError, printable
from engine.files import file_digest
from engine.text import MAX_CHARACTERS, is_clean_name

Severity = Literal["error", "warning"]
SMALLEST_SIDE = 32  # pixels; smaller photos are thumbnails or icons
DEFECTS: dict[str, tuple[Severity, str]] = {
    "empty_file": ("error", "label or image file of 0 bytes"),
    "unreadable_label": ("error", "label file that cannot be opened"),
    "broken_json": ("error", "label file that is not JSON"),
    "wrong_structure": ("error", "JSON file that is not a label of this data set"),
    "wrong_encoding": ("error", "label or caption that is not UTF-8"),
    "replacement_characters": ("error", "label or caption with U+FFFD: characters were lost"),
    "bad_characters": ("error", "label or caption with characters that no text has: controls, halves of characters"),
    "too_long": ("error", f"label value or caption of more than {MAX_CHARACTERS:,} characters"),
    "label_without_photo": ("error", "no image for a label file"),
    "photo_without_label": ("error", "no label file for an image"),
    "label_without_object": ("error", "label without any labelled object"),
    "bad_name": ("error", "file name that is not UTF-8, or has control characters"),
    "unread_format": ("error", "picture in a format that is not read"),
    "equal_stems": ("error", "image of the same name as another, with another suffix"),
    "broken_box": ("error", "box with a missing number, or with something else than a number"),
    "negative_box": ("error", "box with a negative width or height"),
    "zero_area_box": ("error", "box without area"),
    "box_outside_image": ("error", "box with at most one pixel inside the image"),
    "size_mismatch": ("error", "size in the label that is not the image's"),
    "missing_image": ("error", "image file that vanished or cannot be opened"),
    "not_an_image": ("error", f"image file that is none of {', '.join(IMAGE_FORMATS)}"),
    "animated_image": ("error", "animation: which of its pictures the caption means is not known"),
    "broken_image": ("error", "truncated or damaged image file"),
    "oversize_image": ("error", "image with more pixels than are safe to decode"),
    "in_both_splits": ("error", "image with the same bytes as one of the other side of the split"),
    "empty_caption": ("error", "caption file without a caption"),
    "unreadable_caption": ("error", "caption file that cannot be opened"),
    "caption_without_photo": ("error", "no image for a caption file"),
    "photo_without_caption": ("error", "no caption file for an image"),
    "broken_pairs": ("error", "pairs.jsonl that training would refuse"),
    "same_name": ("warning", "caption files of one name in two folders: one photo for the split"),
    "object_without_box": ("warning", "object without a box"),
    "object_without_label": ("warning", "object without labels"),
    "box_over_edge": ("warning", "box that is cut by more than a pixel at the image's edge"),
    "broken_outline": ("warning", "outline with gaps, fewer than 3 points, or something else than numbers"),
    "outline_outside_image": ("warning", "outline with points far outside the image"),
    "zero_area_outline": ("warning", "outline that is a line, or crosses itself until next to nothing is left"),
    "long_outline": ("warning", "outline with more points than an outline has"),
    "crossed_outline": ("warning", "outline that crosses itself: it is filled by the even-odd rule"),
    "outline_off_box": ("warning", "outline and box of one object in different places"),
    "transparent_image": ("warning", "image in which nothing is visible"),
    "name_not_utf8": ("warning", "file name that is not UTF-8, read as the name that it means in cp949"),
    "unknown_value": ("warning", "attribute or value outside the known vocabulary"),
    "unread_content": ("warning", "content of a label that was not understood"),
    "duplicate_id": ("warning", "photo id that another label file has too"),
    "id_differs": ("warning", "photo id that is not the label file's name"),
    "contradicting_labels": ("error", "labels of one photograph that say different things of one object"),
    "duplicate_label": ("warning", "label that says of one photograph what another one says"),
    "duplicate_image": ("warning", "image with the same bytes as another"),
    "tiny_image": ("warning", f"image with a side of less than {SMALLEST_SIDE} pixels"),
    "other_form": ("warning", "caption with invisible or decomposed characters, which is read without them"),
}


@dataclass(frozen=True)
class Finding:
    """One defect of one record; `record` is the path under the source, with the object if it is an object's."""

    record: str
    defect: str
    detail: str

    @property
    def severity(self) -> Severity:
        return DEFECTS[self.defect][0]


@dataclass(frozen=True)
class CheckReport:
    """All findings, sorted by defect (in the order of DEFECTS) and record."""

    form: SourceForm
    labels: int
    images: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(finding.defect for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "labels": self.labels,
            "images": self.images,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "counts": self.counts,
            "findings": [{**asdict(finding), "severity": finding.severity} for finding in self.findings],
        }


@dataclass(frozen=True)
class _Inspected:
    """A worker's result for one image file."""

    width: int = 0
    height: int = 0
    orientation: int = 1
    digest: str = ""
    is_visible: bool = True
    fault: str = ""
    detail: str = ""


@dataclass
class _Findings:
    """Collects findings under paths relative to the source."""

    source: Path
    found: list[Finding] = field(default_factory=list)

    def add(self, path: Path, defect: str, detail: str, part: str = "") -> None:
        record = printable(path.relative_to(self.source).as_posix())
        self.found.append(Finding(f"{record}: {part}" if part else record, defect, detail))

    def sorted(self) -> tuple[Finding, ...]:
        rank = {defect: index for index, defect in enumerate(DEFECTS)}
        return tuple(sorted(self.found, key=lambda finding: (rank[finding.defect], finding.record, finding.detail)))


def check(
    source: Path, *, label_format: LabelFormat | None = None, workers: int = 1, progress: bool = False
) -> CheckReport:
    """Inspects every label, caption and image under `source`; a prepared folder is checked as a plain one.

    Args:
        source: label files with photos, or name.jpg + name.txt (recursive).
        label_format: reads the label files; None: the default of engine.data.formats.
        workers: processes that decode images.
        progress: show a progress bar on stderr.

    Raises:
        InputError: no such folder, or neither labels nor captions in it.
    """
    is_prepared = (source / "pairs.jsonl").is_file()
    form: SourceForm = "plain" if is_prepared else find_form(source)
    findings = _Findings(source)
    if is_prepared:
        try:
            load_pairs(source)
        except InputError as error:
            findings.add(source / "pairs.jsonl", "broken_pairs", str(error))
    if form == "labels":
        folder = scan(source)
        labels = len(folder.labels)
        images = [source / path for path in folder.images]
        inspected = _inspect_all(images, findings, workers=workers, progress=progress)
        _check_labels(folder, label_format or default_label_format(), inspected, findings)
    else:
        matched, unmatched = find_plain(source)
        labels = len(matched)
        images = [pair.image for pair in matched]
        for name, cause, reason in unmatched:
            findings.add(source / name, cause, reason)
        _check_captions([pair.text for pair in matched], findings)
        _inspect_all(images, findings, workers=workers, progress=progress)
    return CheckReport(form, labels, len(images), findings.sorted())


def _inspect_all(images: list[Path], findings: _Findings, *, workers: int, progress: bool) -> dict[Path, _Inspected]:
    results = dict(ordered_map(_inspect, images, workers=workers, title="check", progress=progress))
    by_digest: dict[str, Path] = {}
    sides = source_sides(findings.source)
    for path, result in results.items():
        if result.fault:
            findings.add(path, result.fault, result.detail)
            continue
        if min(result.width, result.height) < SMALLEST_SIDE:
            findings.add(path, "tiny_image", f"{result.width} x {result.height}")
        if not result.is_visible:
            findings.add(path, "transparent_image", "is transparent everywhere")
        first = by_digest.setdefault(result.digest, path)
        if first != path:
            one, other = (each.relative_to(findings.source).as_posix() for each in (path, first))
            is_leak = {side_of(one, sides), side_of(other, sides)} == {"train", "validation"}
            findings.add(path, "in_both_splits" if is_leak else "duplicate_image", f"same as {readable_name(other)}")
    return results


def _inspect(path: Path) -> _Inspected:
    """Decodes one image, in a worker process."""
    try:
        image, orientation = open_layered(path)
        digest = file_digest(path).sha256
    except ImageFault as fault:
        return _Inspected(fault=fault.defect, detail=fault.remedy)
    except OSError as error:
        return _Inspected(fault="missing_image", detail=f"cannot be read: {error.strerror}")
    return _Inspected(*image.size, orientation, digest, is_visible=visible_layer(image) is not None)


# ------------------------------------------------------------------------------------------------------- labels


def _check_labels(
    folder: SourceFolder, label_format: LabelFormat, inspected: dict[Path, _Inspected], findings: _Findings
) -> None:
    def stated_names(name: str) -> tuple[str, ...]:
        try:
            return label_format.read(folder.root / name).image_names
        except LabelFault:
            return ()

    pairing = pair_files(folder, stated_names)
    contents = {label: inspected[folder.root / image].digest or image for label, image in pairing.image_of.items()}
    labels_of = Counter(contents.values())
    shared: dict[str, list[tuple[str, PhotoLabel]]] = {}  # labels of one photograph, by its content
    photos: dict[str, str] = {}
    for name in folder.labels:
        path, image = folder.root / name, pairing.image_of.get(name)
        try:
            label = label_format.read(path)
        except LabelFault as fault:
            findings.add(path, fault.defect, fault.remedy)
            continue
        twin = pairing.refused.get(name)
        if twin is not None and say_the_same(path, folder.root / twin, label_format):
            findings.add(path, "duplicate_label", f"says what {readable_name(twin)} says")
            continue
        if image is None:
            findings.add(path, "label_without_photo", f"no image named {path.stem}, {label.photo} or similar")
        first = photos.setdefault(label.photo, name)
        if first != name:
            findings.add(path, "duplicate_id", f"{label.photo} is {readable_name(first)} too")
        if label.photo != stem_of(name):
            findings.add(path, "id_differs", f"the label's photo id is {label.photo}")
        _check_content(path, label, findings)
        _check_places(path, label, None if image is None else inspected[folder.root / image], findings)
        if image is not None and labels_of[contents[name]] > 1:
            shared.setdefault(contents[name], []).append((name, label))
    for labels in shared.values():
        _check_agreement(folder, labels, pairing.image_of, findings)
    for name in (*folder.labels, *folder.images):
        if not name.isprintable() and any(ord(letter) in BYTES for letter in name):
            findings.add(folder.root / name, "name_not_utf8", f"is read as {readable_name(name)}")
    for name in folder.others:
        if suffix_of(name) in UNREAD_SUFFIXES:
            findings.add(folder.root / name, "unread_format", f"convert it to JPEG or PNG ({suffix_of(name)})")
    claimed = set(pairing.image_of.values())
    for image in folder.images:
        if image in pairing.alike:
            findings.add(folder.root / image, "equal_stems", f"same name as {readable_name(pairing.alike[image])}")
        elif image not in claimed:
            findings.add(folder.root / image, "photo_without_label", "no label file names it")


def _check_agreement(
    folder: SourceFolder, labels: list[tuple[str, PhotoLabel]], image_of: dict[str, str], findings: _Findings
) -> None:
    """What several labels of one photograph say of its objects."""
    objects = []
    for number, (name, label) in enumerate(labels):
        for index, item in enumerate(label.objects):
            crop = Crop(
                f"{readable_name(name)}: {item.name}", name, "", item.key, item.box, None, (item.caption,), label.photo,
                "train", item.attributes, (label.width, label.height),
            )  # fmt: skip
            objects.append(GroupedCrop((number, index), image_of[name], crop))
    for (number, index), verdict in judge_group(objects, has_sides=False).items():
        name, label = labels[number]
        if verdict.cause != "duplicate_photo":  # which its image is named for
            findings.add(folder.root / name, verdict.cause, verdict.reason, label.objects[index].name)


def _check_content(path: Path, label: PhotoLabel, findings: _Findings) -> None:
    for line in label.unknown_values:
        findings.add(path, "unknown_value", line)
    for note in label.notes:
        findings.add(path, "unread_content", note)
    if not label.objects:
        findings.add(path, "label_without_object", "no object has a label or a box")
    for item in label.objects:
        if item.box_fault:
            findings.add(path, "broken_box", item.box_fault, item.name)
        elif item.box is None:
            findings.add(path, "object_without_box", "has no box to crop", item.name)
        if not item.attributes:
            findings.add(path, "object_without_label", "has no labels for a caption", item.name)
        if item.outline_fault:
            findings.add(path, "broken_outline", item.outline_fault, item.name)


def _check_places(path: Path, label: PhotoLabel, image: _Inspected | None, findings: _Findings) -> None:
    width, height = label.width, label.height
    frame = None
    if image is not None and not image.fault:
        size, labelled = (image.width, image.height), (width, height)
        frame = label_frame(size, image.orientation, labelled)
        if frame is None:
            findings.add(path, "size_mismatch", size_difference("the image", size, image.orientation, labelled))
        else:
            width, height = size
    for item in label.objects:
        box, outline = item.box, item.outline
        if frame is not None:
            box = None if box is None else frame.box(box, is_centred=False)
            outline = None if outline is None else frame.outline(outline)
        if outline is not None and width is not None and height is not None:
            inside = None if box is None else pixel_box(box, width, height)[0]
            fitted = fit_outline(outline, width, height, inside)
            if isinstance(fitted, OutlineFault):
                findings.add(path, fitted.defect, fitted.reason, item.name)
            elif crosses_itself(fitted):
                findings.add(path, "crossed_outline", "is filled by the even-odd rule", item.name)
        if box is None:
            continue
        numbers = f"x {box.x:g}, y {box.y:g}, width {box.width:g}, height {box.height:g}"
        if box.width < 0 or box.height < 0:
            findings.add(path, "negative_box", numbers, item.name)
        elif box.width * box.height <= 1:
            findings.add(path, "zero_area_box", numbers, item.name)
        elif width is not None and height is not None:
            place = f"{numbers} in an image of {width} x {height}"
            if pixel_box(box, width, height)[0] is None:
                findings.add(path, "box_outside_image", place, item.name)
            elif min(box.x, box.y, width - box.x - box.width, height - box.y - box.height) < -1:
                findings.add(path, "box_over_edge", place, item.name)


# ----------------------------------------------------------------------------------------------------- captions


def _check_captions(paths: list[Path], findings: _Findings) -> None:
    _check_stems(paths, "same_name", findings)
    for path in paths:
        try:
            read_captions(path)
        except CaptionFault as fault:
            findings.add(path, fault.defect, fault.remedy)
            continue
        if not is_clean_name(path.read_text(encoding="utf-8-sig")):
            findings.add(
                path, "other_form", "training and prompts use the composed form (NFC), without invisible characters"
            )


def _check_stems(paths: Iterable[Path], defect: str, findings: _Findings) -> None:
    stems: dict[str, Path] = {}
    for path in paths:
        first = stems.setdefault(path.stem, path)
        if first != path:
            findings.add(path, defect, f"same name as {first.relative_to(findings.source).as_posix()}")
