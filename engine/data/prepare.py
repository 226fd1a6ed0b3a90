"""`kodalle data prepare`: a labelled or captioned folder becomes the prepared folder that training reads.

Owns the prepared folder's form (version FORMAT_VERSION):

    DST/images/<key>.png    one square crop or cut-out an object (or the whole image, for plain sources)
    DST/images/<key>.txt    its caption(s), so that DST/images is also a plain folder
    DST/pairs.jsonl         one line a pair: key, image, caption, photo, split, attributes (captions, if several)
    DST/report.json         records = used + set aside by cause, each one named; the options; the format version

Every record of the source is either used or named in the report with its cause. Causes are of two kinds: what is normal
in incomplete labels (an object without box, label or outline: NORMAL), and faults. Faults are set aside and counted too,
but more than `max_bad` of them stops the run, and nothing is written. The bytes written depend on the source and the
options only, not on the number of workers.
"""

import contextlib
import functools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from engine.data.crops import (
    ImageFault,
    PixelBox,
    crop_and_resize,
    open_image,
    open_layered,
    pixel_box,
)
from engine.data.cut_out import (
    Layer,
    OutlineFault,
    fit_outline,
    ground_rgb,
    outlined_layer,
    place_on_ground,
    visible_layer,
)
from engine.data.label_format import Box
from engine.data.pairs import FORMAT_VERSION, REPORT_FILE
from engine.data.sources import Crop, CropJob, PrepareOptions, Skipped, SourceForm, SourceListing, list_source
from engine.data.workers import ordered_map
from engine.errors import InputError
from engine.files import atomic_folder, write_json


@dataclass(frozen=True)
class PrepareReport:
    """Counts of a run: records = used + len(skipped) and used = train + validation; `cut_outs` of the used."""

    form: SourceForm
    split: str
    records: int
    train: int
    validation: int
    cut_outs: int
    skipped: tuple[Skipped, ...]
    notes: dict[str, int]
    options: PrepareOptions

    @property
    def used(self) -> int:
        return self.train + self.validation

    @property
    def bad(self) -> int:
        return sum(item.is_bad for item in self.skipped)

    @property
    def causes(self) -> dict[str, int]:
        return dict(sorted(Counter(item.cause for item in self.skipped).items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "form": self.form,
            "split": self.split,
            "records": self.records,
            "used": self.used,
            "train": self.train,
            "validation": self.validation,
            "cut_outs": self.cut_outs,
            "set_aside": self.causes,
            "bad": self.bad,
            "skipped": [asdict(item) for item in self.skipped],
            "notes": self.notes,
            "options": self.options.to_json(),
        }


def prepare(
    source: Path,
    destination: Path,
    options: PrepareOptions | None = None,
    *,
    strict: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> PrepareReport:
    """Prepares `source` for training.

    Args:
        source: label files with photos, or name.jpg + name.txt (recursive); see `options.form`.
        destination: a folder that is new or empty; it appears only once complete.
        options: decide the content; None: PrepareOptions' defaults.
        strict: the first faulty record is an InputError.
        workers: processes.
        progress: show a progress bar on stderr.

    Raises:
        InputError: nothing to prepare, too many faults, a destination in use; nothing is left behind then.
    """
    options = options or PrepareOptions()
    _check_places(source, destination)
    with atomic_folder(destination) as folder:
        listing = list_source(source, options, strict=strict)
        records = listing.records
        _refuse_bad(source, listing, records, options.max_bad)
        counts = _write_pairs(folder, listing, options, source, workers=workers, progress=progress)
        report = PrepareReport(
            form=listing.form,
            split="source folders" if listing.has_sides else "hash of photo",
            records=records,
            train=counts["train"],
            validation=counts["validation"],
            cut_outs=counts["cut_outs"],
            skipped=tuple(sorted(listing.skipped, key=lambda item: (item.record, item.cause))),
            notes=dict(sorted(listing.notes.items())),
            options=options,
        )
        _refuse_empty(source, report)
        write_json(folder / REPORT_FILE, report.to_json())
    return report


def _check_places(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise InputError("source", source, "no such folder: give one with labels and images, or name.jpg + name.txt")
    if destination.resolve().is_relative_to(source.resolve()):
        raise InputError("destination", destination, f"lies inside the source {source}: choose a folder outside")


def _write_pairs(
    folder: Path, listing: SourceListing, options: PrepareOptions, source: Path, *, workers: int, progress: bool
) -> Counter[str]:
    """Writes images, captions and pairs.jsonl; returns the number of pairs of each split, and of `cut_outs`."""
    counts: Counter[str] = Counter()
    records = listing.records
    cut = functools.partial(_cut_job, images=folder / "images", options=options)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        # closed at once when a fault ends the run: no worker may write into a folder that is being removed
        results = ordered_map(cut, listing.jobs, workers=workers, title="prepare", progress=progress)
        with contextlib.closing(results):
            for job, outcomes in results:
                for crop, outcome in zip(job.crops, outcomes, strict=True):
                    if isinstance(outcome, _Fault):
                        listing.skip(crop.record, *outcome)
                        continue
                    counts[crop.split] += 1
                    counts["cut_outs"] += outcome == "cut-out"
                    lines.write(json.dumps(_line(crop, options), ensure_ascii=False) + "\n")
                if any(isinstance(outcome, _Fault) for outcome in outcomes):
                    _refuse_bad(source, listing, records, options.max_bad)  # at once, not at the end
    return counts


def _line(crop: Crop, options: PrepareOptions) -> dict[str, Any]:
    line: dict[str, Any] = {
        "key": crop.key,
        "image": f"images/{crop.key}.{options.image_format}",
        "caption": crop.captions[0],
        "photo": crop.photo,
        "split": crop.split,
        "attributes": crop.attributes,
    }
    return line if len(crop.captions) == 1 else {**line, "captions": list(crop.captions)}


class _Fault(NamedTuple):
    cause: str
    reason: str


_Outcome = _Fault | Literal["crop", "cut-out"]


def _cut_job(job: CropJob, images: Path, options: PrepareOptions) -> list[_Outcome]:
    """Writes the crops or cut-outs of one photo, in a worker process."""
    is_layered = options.cut_out and job.labelled_size is None
    try:
        photo = open_layered(job.image_path) if is_layered else open_image(job.image_path)
    except ImageFault as fault:
        return [_Fault(fault.defect, f"{job.image_path.name} {fault.remedy}") for _ in job.crops]
    outcomes: list[_Outcome] = []
    for crop in job.crops:
        found = _visible(photo, options) if is_layered else _labelled(crop, job, photo, options)
        if not isinstance(found, _Fault):
            _write(_square(photo, found, options), images / f"{crop.key}.{options.image_format}", crop, options)
        outcomes.append(found if isinstance(found, _Fault) else "cut-out" if isinstance(found, Layer) else "crop")
    return outcomes


def _visible(photo: Image.Image, options: PrepareOptions) -> Layer | PixelBox | _Fault:
    """What is visible of a plain source's RGBA image."""
    if photo.getchannel("A").getextrema()[0] == 255:
        if options.keep_uncut:
            return PixelBox(0, 0, *photo.size)
        return _Fault("no_outline", "nothing of it is transparent (keep_uncut takes it)")
    return visible_layer(photo) or _Fault("bad_outline", "is transparent everywhere")


def _labelled(crop: Crop, job: CropJob, photo: Image.Image, options: PrepareOptions) -> Layer | PixelBox | _Fault:
    """What the label says of an object, in pixels of its photo."""
    width, height = job.labelled_size or (None, None)
    x_scale, y_scale = photo.width / (width or photo.width), photo.height / (height or photo.height)
    if (x_scale, y_scale) != (1.0, 1.0) and not options.scale_boxes:
        sizes = f"label says {width} x {height}, {job.image_path.name} is {photo.width} x {photo.height}"
        return _Fault("size_mismatch", f"{sizes} (photos resized after labelling: scale_boxes)")
    margin, box = options.box_margin if crop.outline is None else 0.0, None
    if crop.box is not None:
        x, y, box_width, box_height = crop.box
        scaled = Box(x * x_scale, y * y_scale, box_width * x_scale, box_height * y_scale)
        box, reason = pixel_box(scaled, photo.width, photo.height, origin=options.box_origin, margin=margin)
        if box is None:
            return _Fault("bad_box", reason)
    if crop.outline is None:
        return box or PixelBox(0, 0, *photo.size)
    outline = fit_outline(tuple((x * x_scale, y * y_scale) for x, y in crop.outline), *photo.size, box)
    if isinstance(outline, OutlineFault):
        return _Fault("bad_outline", outline.reason)
    return outlined_layer(photo, outline)


def _square(photo: Image.Image, found: Layer | PixelBox, options: PrepareOptions) -> Image.Image:
    if isinstance(found, Layer):
        assert options.ground is not None  # of every cut_out
        ground = ground_rgb(options.ground)
        return place_on_ground(found, options.image_size, ground=ground, margin=options.box_margin)
    return crop_and_resize(photo.convert("RGB"), found, options.image_size, keep_aspect=options.keep_aspect)


def _write(square: Image.Image, path: Path, crop: Crop, options: PrepareOptions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.image_format == "png":
        square.save(path, "PNG")
    else:
        square.save(path, "JPEG", quality=95, subsampling=0)
    captions = path.with_name(path.name.removesuffix(path.suffix) + ".txt")
    captions.write_text("\n".join(crop.captions) + "\n", encoding="utf-8")


def _refuse_bad(source: Path, listing: SourceListing, records: int, max_bad: float) -> None:
    bad = [item for item in listing.skipped if item.is_bad]
    if len(bad) > max_bad * records:
        causes = ", ".join(f"{cause} {n}" for cause, n in Counter(item.cause for item in bad).most_common())
        summary = f"{len(bad)} of {records} records are bad ({causes}), the first: {bad[0].record}: {bad[0].reason}"
        remedy = f"more than max_bad {max_bad:g}: run `kodalle data check` on it, repair them, or allow more"
        raise InputError("source", source, f"{summary}; {remedy}")


def _refuse_empty(source: Path, report: PrepareReport) -> None:
    if not report.used:
        causes = ", ".join(f"{cause} {count}" for cause, count in report.causes.items()) or "it is empty"
        raise InputError("source", source, f"holds nothing to train on ({causes})")
    if not report.train:
        raise InputError("source", source, "all pairs are for validation: lower validation_fraction, or add images")
