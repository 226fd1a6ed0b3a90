"""`kodalle data prepare`: a labelled or captioned folder becomes the prepared folder that training reads.

Owns the prepared folder's form (version FORMAT_VERSION):

    DST/images/<key>.png    one square crop an object (or the whole image, for plain sources)
    DST/images/<key>.txt    its caption(s), so that DST/images is also a plain folder
    DST/pairs.jsonl         one line a pair: key, image, caption, photo, split, attributes (captions, if several)
    DST/report.json         records = used + set aside by cause, each one named; the options; the format version

Every record of the source is either used or named in the report with its cause. Causes are of two kinds: what is normal
in incomplete labels (an object without box or without label: NORMAL), and faults. Faults are set aside and counted too,
but more than `max_bad` of them stops the run, and nothing is written. The bytes written depend on the source and the
options only, not on the number of workers.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.crops import ImageFault, crop_and_resize, open_image, pixel_box
from engine.data.label_format import Box
from engine.data.pairs import FORMAT_VERSION
from engine.data.sources import Crop, CropJob, PrepareOptions, Skipped, SourceForm, SourceListing, list_source
from engine.data.workers import ordered_map
from engine.errors import InputError
from engine.files import atomic_folder, write_json


@dataclass(frozen=True)
class PrepareReport:
    """Counts of a run: records = used + len(skipped) and used = train + validation."""

    form: SourceForm
    split: str
    records: int
    train: int
    validation: int
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
            skipped=tuple(sorted(listing.skipped, key=lambda item: (item.record, item.cause))),
            notes=dict(sorted(listing.notes.items())),
            options=options,
        )
        _refuse_empty(source, report)
        write_json(folder / "report.json", report.to_json())
    return report


def _check_places(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise InputError("source", source, "no such folder: give one with labels and images, or name.jpg + name.txt")
    if destination.resolve().is_relative_to(source.resolve()):
        raise InputError("destination", destination, f"lies inside the source {source}: choose a folder outside")


def _write_pairs(
    folder: Path, listing: SourceListing, options: PrepareOptions, source: Path, *, workers: int, progress: bool
) -> Counter[str]:
    """Writes images, captions and pairs.jsonl; returns the number of pairs of each split."""
    counts: Counter[str] = Counter()
    records = listing.records
    cut = functools.partial(_cut_job, images=folder / "images", options=options)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        # closed at once when a fault ends the run: no worker may write into a folder that is being removed
        results = ordered_map(cut, listing.jobs, workers=workers, title="prepare", progress=progress)
        with contextlib.closing(results):
            for job, faults in results:
                for crop, fault in zip(job.crops, faults, strict=True):
                    if fault is not None:
                        listing.skip(*fault)
                        continue
                    counts[crop.split] += 1
                    lines.write(json.dumps(_line(crop, options), ensure_ascii=False) + "\n")
                if any(faults):
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


def _cut_job(job: CropJob, images: Path, options: PrepareOptions) -> list[tuple[str, str, str] | None]:
    """Writes the crops of one photo, in a worker process; for each crop None, or (record, cause, reason)."""
    try:
        photo = open_image(job.image_path)
    except ImageFault as fault:
        return [(crop.record, fault.defect, f"{job.image_path.name} {fault.remedy}") for crop in job.crops]
    return list(_cut(job, photo, images, options))


def _cut(
    job: CropJob, photo: Image.Image, images: Path, options: PrepareOptions
) -> Iterator[tuple[str, str, str] | None]:
    width, height = job.labelled_size
    scale_x, scale_y = photo.width / (width or photo.width), photo.height / (height or photo.height)
    for crop in job.crops:
        box = None
        if crop.box is not None:
            if (scale_x, scale_y) != (1.0, 1.0) and not options.scale_boxes:
                sizes = f"label says {width} x {height}, {job.image_path.name} is {photo.width} x {photo.height}"
                yield crop.record, "size_mismatch", f"{sizes} (photos resized after labelling: scale_boxes)"
                continue
            x, y, box_width, box_height = crop.box
            scaled = Box(x * scale_x, y * scale_y, box_width * scale_x, box_height * scale_y)
            box, reason = pixel_box(
                scaled, photo.width, photo.height, origin=options.box_origin, margin=options.box_margin
            )
            if box is None:
                yield crop.record, "bad_box", reason
                continue
        square = crop_and_resize(photo, box, options.image_size, keep_aspect=options.keep_aspect)
        path = images / f"{crop.key}.{options.image_format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if options.image_format == "png":
            square.save(path, "PNG")
        else:
            square.save(path, "JPEG", quality=95, subsampling=0)
        path.with_name(path.name.removesuffix(path.suffix) + ".txt").write_text(
            "\n".join(crop.captions) + "\n", encoding="utf-8"
        )
        yield None


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
