"""`kodalle data prepare`: a labelled or captioned folder becomes the prepared folder that training reads.

Owns the prepared folder's form (version FORMAT_VERSION):

    DST/images/<key>.png    one square crop or cut-out an object (or the whole image, for plain sources)
    DST/images/<key>.txt    its caption(s), so that DST/images is also a plain folder
    DST/pairs.jsonl         one line a pair: key, image, caption, photo, split, attributes (captions, if several)
    DST/set_aside.jsonl     one line a record that is not used: record, cause, reason
    DST/report.json         records = used + set aside, by cause, with examples; what else was found; the options
    DST/prepare.log         progress with the time

Every record of the source is either used or named with its cause. Causes are of two kinds: what is normal in large data sets
(NORMAL), and faults. Faults are set aside and counted too, but more than `max_bad` of them stops the run, and nothing is
written. The bytes written depend on the source and the options only (but for the log), not on the number of workers nor on
how often the work was stopped.

A delivery has a million records, so they pass through files: labels are read into `labels.jsonl`, photographs cut into
`images/` with what became of them in `cuts.jsonl`, and a last pass over both writes the rest. In memory are names of files and a
number for each photograph.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.cropping import CutPhoto, cut_photo
from engine.data.duplicates import GroupedCrop, Verdict, judge_group
from engine.data.journal import Journal
from engine.data.pairs import FORMAT_VERSION, REPORT_FILE, Split, split_of
from engine.data.prepare_entries import crop_job, cut_entry, label_entry, text_number
from engine.data.set_aside import NORMAL, Examples, Skipped, Skips
from engine.data.source_files import SourceForm, paths_under
from engine.data.sources import (
    Crop,
    CropJob,
    PhotoListing,
    PrepareOptions,
    SourcePhoto,
    list_photos,
    read_photo,
)
from engine.data.work_folder import JOURNAL, work_folder
from engine.data.workers import ordered_map
from engine.errors import InputError
from engine.files import lies_within, write_json
from engine.progress import ProgressBar

SET_ASIDE_FILE = "set_aside.jsonl"
LOG_FILE = "prepare.log"
_MADE = ("images", SET_ASIDE_FILE, REPORT_FILE, LOG_FILE, "pairs.jsonl")
_LABELS_A_JOB = 64  # reading one takes no longer than sending it to a worker
_MANY_LABELS = 2000  # fewer are read before workers have started


@dataclass(frozen=True)
class PrepareReport:
    """Counts of a run: records = used + set aside and used = train + validation; `cut_outs` of the used.

    Args:
        set_aside: count and first records of each cause.
        found: count and first examples of what is used, but worth knowing.
    """

    folder: Path
    form: SourceForm
    split: str
    train: int
    validation: int
    cut_outs: int
    set_aside: dict[str, Examples]
    found: dict[str, Examples]
    notes: dict[str, int]
    options: PrepareOptions

    @property
    def used(self) -> int:
        return self.train + self.validation

    @property
    def records(self) -> int:
        return self.used + sum(self.causes.values())

    @property
    def bad(self) -> int:
        return sum(examples.count for cause, examples in self.set_aside.items() if cause not in NORMAL)

    @property
    def causes(self) -> dict[str, int]:
        return {cause: examples.count for cause, examples in self.set_aside.items()}

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """All records set aside, sorted; read from the prepared folder."""
        lines = (self.folder / SET_ASIDE_FILE).read_text(encoding="utf-8").splitlines()
        return tuple(
            sorted((Skipped(**json.loads(line)) for line in lines), key=lambda item: (item.record, item.cause))
        )

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
            "examples": {cause: examples.to_json()["examples"] for cause, examples in self.set_aside.items()},
            "found": {kind: examples.to_json() for kind, examples in self.found.items()},
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
    """Prepares `source` for training. A run that was stopped goes on where it was.

    Args:
        source: label files with photos, or name.jpg + name.txt (recursive); see `options.form`.
        destination: a folder that is new or empty; it appears only once complete.
        options: decide the content; None: PrepareOptions' defaults.
        strict: the first faulty record is an InputError.
        workers: processes.
        progress: show progress with the time left.

    Raises:
        InputError: nothing to prepare, too many faults, a destination in use; nothing is left behind then.
    """
    options = options or PrepareOptions()
    if workers < 1:
        raise InputError("workers", workers, "must be at least 1")
    _check_places(source, destination)
    with work_folder(destination, _identity(source, options), made=_MADE) as folder:
        work = _Work(source, folder, options, strict=strict, workers=workers, progress=progress)
        with work.skips.writing(folder / SET_ASIDE_FILE):
            report = work.run(destination)
        write_json(folder / REPORT_FILE, report.to_json())
    return report


def _check_places(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise InputError("source", source, "no such folder: give one with labels and images, or name.jpg + name.txt")
    if lies_within(destination, source):
        raise InputError("destination", destination, f"lies inside the source {source}: choose a folder outside")


def _identity(source: Path, options: PrepareOptions) -> dict[str, Any]:
    """All that the work depends on. `max_bad` is left out: it decides whether there is a result, not which."""
    digest = hashlib.sha256()
    for path in paths_under(source):
        found = os.stat(
            source / path, follow_symlinks=os.path.exists(source / path)
        )  # a link to nothing is named later
        digest.update(f"{found.st_size} {found.st_mtime_ns} {path}\n".encode(errors="surrogateescape"))
    stated = {name: value for name, value in options.to_json().items() if name != "max_bad"}
    return {"format": FORMAT_VERSION, "files": digest.hexdigest(), "options": stated}


class _Work:
    """One run: the phases, and what they hand on to each other."""

    def __init__(
        self, source: Path, folder: Path, options: PrepareOptions, *, strict: bool, workers: int, progress: bool
    ) -> None:
        self._source, self._folder, self._options = source, folder, options
        self._workers, self._progress = workers, progress
        self.skips = Skips(strict=strict)
        self._notes: Counter[str] = Counter()
        self._records = 0  # in all; known once all labels are read

    def run(self, destination: Path) -> PrepareReport:
        listing = list_photos(self._source, self._options, self.skips.add)
        self._notes.update(listing.notes)
        with Journal(self._folder / JOURNAL / "labels.jsonl") as labels:
            self._read_labels(listing, labels)
            shared = self._count_labels(listing, labels)
            with Journal(self._folder / JOURNAL / "cuts.jsonl") as cuts:
                self._cut_photos(listing, labels, cuts, shared)
                counts = self._write_pairs(listing, labels, cuts, shared)
        report = PrepareReport(
            folder=destination,
            form=listing.form,
            split="source folders" if listing.sides else "hash of photo",
            train=counts["train"],
            validation=counts["validation"],
            cut_outs=counts["cut-out"],
            set_aside=self.skips.by_cause(),
            found=listing.found.by_kind(),
            notes=dict(sorted(self._notes.items())),
            options=self._options,
        )
        _refuse_empty(self._source, report)
        return report

    # ------------------------------------------------------------------------------------------------------- phases

    def _read_labels(self, listing: PhotoListing, labels: Journal) -> None:
        """What the texts of each photo tell, one entry a photo."""
        start = len(labels)
        rest = _in_chunks(listing.photos, start, _LABELS_A_JOB)
        read = functools.partial(_read_photos, source=self._source, sides=listing.sides, options=self._options)
        with self._bar("reading labels", len(listing.photos), start) as bar:
            results = ordered_map(read, rest, workers=self._workers if len(listing.photos) > _MANY_LABELS else 1)
            with contextlib.closing(results):
                for _, entries in results:
                    for entry in entries:
                        labels.append(entry)
                    bar.update(len(labels))

    def _count_labels(self, listing: PhotoListing, labels: Journal) -> frozenset[int]:
        """Counts records and what is set aside of them; returns the keys' bases that several labels have, as digests."""
        seen: set[int] = set()
        shared: set[int] = set()
        ids: set[int] = set()
        crops = 0
        for entry in labels:
            for item in entry["skipped"]:
                self.skips.add(Skipped(**item))
            self._notes.update(entry["notes"])
            for kind, record, reason in entry["found"]:
                listing.found.add(kind, record, reason)
            crops += len(entry["crops"])
            for photo in entry["ids"]:
                number = text_number(photo)
                if number in ids:
                    listing.found.add(
                        "repeated_id", entry["texts"][0], f"photo id {photo} is that of another label too"
                    )
                ids.add(number)
            if len(entry["texts"]) > 1:
                listing.found.add("several_labels", entry["image"], f"has {len(entry['texts'])} label files")
            for base in {(crop["base"], crop["text"]) for crop in entry["crops"]}:
                number = text_number(base[0].casefold())
                (shared if number in seen else seen).add(number)
        self._records = crops + self.skips.count
        self._refuse_bad()
        return frozenset(shared)

    def _cut_photos(self, listing: PhotoListing, labels: Journal, cuts: Journal, shared: frozenset[int]) -> None:
        """Writes images and their captions, and what became of each crop."""
        (self._folder / "images").mkdir(exist_ok=True)
        for entry in cuts:  # of an earlier process
            self._count_faults(entry)
        start, total = len(cuts), len(listing.photos)
        jobs = (crop_job(self._source, entry, shared) for entry in itertools.islice(labels, start, None))
        cut = functools.partial(_cut, images=self._folder / "images", options=self._options)
        with self._bar("cutting photographs", total, start) as bar:
            # closed at once when a fault ends the run: no worker may write into a folder that is being removed
            results = ordered_map(cut, jobs, workers=max(1, min(self._workers, total - start)))
            with contextlib.closing(results):
                for job, result in results:
                    entry = cut_entry(job, result)
                    if self._count_faults(entry):
                        self._refuse_bad()  # at once, not at the end
                    cuts.append(entry)
                    bar.update(len(cuts), f"{self.skips.count} set aside")

    def _write_pairs(
        self, listing: PhotoListing, labels: Journal, cuts: Journal, shared: frozenset[int]
    ) -> Counter[str]:
        """Writes pairs.jsonl; returns the number of pairs of each split, and of crops and cut-outs."""
        verdicts, leaders = self._judge(listing, labels, cuts)
        counts: Counter[str] = Counter()
        options = self._options
        with (self._folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
            for number, (job, entry) in enumerate(self._cut_jobs(labels, cuts, shared)):
                for index, (crop, outcome) in enumerate(zip(job.crops, entry["outcomes"], strict=True)):
                    if not isinstance(outcome, str):
                        continue
                    verdict = verdicts.get((number, index))
                    if verdict is not None:
                        self.skips.add(Skipped(crop.record, verdict.cause, verdict.reason))
                        _remove(self._folder / "images", crop, options)
                        continue
                    photo, split = leaders.get(number, (crop.photo, crop.split))
                    counts.update((split, outcome))
                    line = _line(crop, photo, split, options)
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._refuse_bad()
        return counts

    # -------------------------------------------------------------------------------------------------------- parts

    def _judge(
        self, listing: PhotoListing, labels: Journal, cuts: Journal
    ) -> tuple[dict[tuple[int, int], Verdict], dict[int, tuple[str, Split]]]:
        """What becomes of photographs that are there more than once: crops set aside, and whom others follow."""
        seen: set[int] = set()
        repeated: set[int] = set()
        for entry in cuts:
            if entry["digest"]:
                number = int(entry["digest"][:16], 16)
                (repeated if number in seen else seen).add(number)
        groups: dict[int, list[GroupedCrop]] = {}
        for number, (job, entry) in enumerate(self._cut_jobs(labels, cuts, frozenset())):
            digest = int(entry["digest"][:16] or "0", 16)
            if digest in repeated or len({crop.text for crop in job.crops}) > 1:
                image = entry["image"]
                groups.setdefault(digest, []).extend(
                    GroupedCrop((number, index), image, crop)
                    for index, (crop, outcome) in enumerate(zip(job.crops, entry["outcomes"], strict=True))
                    if isinstance(outcome, str)
                )
        verdicts: dict[tuple[int, int], Verdict] = {}
        leaders: dict[int, tuple[str, Split]] = {}
        for group in groups.values():
            verdicts |= judge_group(group, has_sides=bool(listing.sides))
            if group and not listing.sides:
                photo = group[0].crop.photo
                split = split_of(photo, self._options.validation_fraction, self._options.seed)
                leaders |= {item.number[0]: (photo, split) for item in group}
        return verdicts, leaders

    def _cut_jobs(
        self, labels: Journal, cuts: Journal, shared: frozenset[int]
    ) -> Iterator[tuple[CropJob, dict[str, Any]]]:
        for entry, cut in zip(labels, cuts, strict=True):
            yield crop_job(self._source, entry, shared), {**cut, "image": entry["image"]}

    def _count_faults(self, entry: dict[str, Any]) -> bool:
        """Sets the crops aside that could not be cut; whether there are some."""
        faults = [outcome for outcome in entry["outcomes"] if not isinstance(outcome, str)]
        for record, cause, reason in faults:
            self.skips.add(Skipped(record, cause, reason))
        return bool(faults)

    def _refuse_bad(self) -> None:
        if self.skips.bad > self._options.max_bad * self._records:
            summary = f"{self.skips.bad} of {self._records} records are bad {self.skips.summary_of_bad()}"
            remedy = f"more than max_bad {self._options.max_bad:g}: run `kodalle data check` on it, repair them, or allow more"
            raise InputError("source", self._source, f"{summary}; {remedy}")

    def _bar(self, name: str, total: int, start: int) -> ProgressBar:
        log = self._folder / LOG_FILE
        return ProgressBar(name, total=total, start=start, enabled=self._progress and total > 0, log=log)


def _in_chunks(photos: list[SourcePhoto], start: int, size: int) -> Iterator[list[SourcePhoto]]:
    for first in range(start, len(photos), size):
        yield photos[first : first + size]


def _read_photos(
    photos: list[SourcePhoto], source: Path, sides: dict[str, Split], options: PrepareOptions
) -> list[dict[str, Any]]:
    """Entries of `labels.jsonl`, in a worker process."""
    return [label_entry(read_photo(photo, source, sides, options)) for photo in photos]


def _cut(job: CropJob, images: Path, options: PrepareOptions) -> CutPhoto:
    return cut_photo(job, images, options) if job.crops else CutPhoto("", [])


def _line(crop: Crop, photo: str, split: Split, options: PrepareOptions) -> dict[str, Any]:
    line: dict[str, Any] = {
        "key": crop.key,
        "image": f"images/{crop.key}.{options.image_format}",
        "caption": crop.captions[0],
        "photo": photo,
        "split": split,
        "attributes": crop.attributes,
    }
    return line if len(crop.captions) == 1 else {**line, "captions": list(crop.captions)}


def _remove(images: Path, crop: Crop, options: PrepareOptions) -> None:
    (images / f"{crop.key}.{options.image_format}").unlink(missing_ok=True)
    (images / f"{crop.key}.txt").unlink(missing_ok=True)


def _refuse_empty(source: Path, report: PrepareReport) -> None:
    if not report.used:
        causes = ", ".join(f"{cause} {count}" for cause, count in report.causes.items()) or "it is empty"
        archives = report.found.get("archive_not_read")
        hint = "" if archives is None else ": {} is an archive: {}".format(*archives.first[0])
        raise InputError("source", source, f"holds nothing to train on ({causes}){hint}")
    if not report.train:
        raise InputError("source", source, "all pairs are for validation: lower validation_fraction, or add images")
