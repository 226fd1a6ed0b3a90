"""Lines of the journals of a preparation: what was read of one photo, and what became of its crops."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.data.cropping import CropFault, CutPhoto
from engine.data.label_format import Box
from engine.data.pair_keys import distinct_base
from engine.data.sources import Crop, CropJob, ReadPhoto


def label_entry(read: ReadPhoto) -> dict[str, Any]:
    """What the texts of one photo tell, as a line of `labels.jsonl`."""
    return {
        "image": read.photo.image,
        "texts": read.photo.texts,
        "ids": read.ids,
        "crops": [asdict(crop) for crop in read.crops],
        "skipped": [asdict(item) for item in read.skipped],
        "notes": read.notes,
        "found": read.found,
    }


def crop_job(source: Path, entry: dict[str, Any], shared: frozenset[int]) -> CropJob:
    """The crops of one photo, under keys that no other has."""
    crops = [_crop(tree) for tree in entry["crops"]]
    distinct = [
        replace(crop, base=distinct_base(crop.base, crop.text)) if text_number(crop.base.casefold()) in shared else crop
        for crop in crops
    ]
    return CropJob(source / entry["image"], tuple(distinct))


def cut_entry(job: CropJob, result: CutPhoto) -> dict[str, Any]:
    """What became of one photo's crops, as a line of `cuts.jsonl`: `crop`, `cut-out`, or record, cause and reason."""
    outcomes = [
        [crop.record, outcome.cause, outcome.reason] if isinstance(outcome, CropFault) else outcome
        for crop, outcome in zip(job.crops, result.outcomes, strict=True)
    ]
    return {"digest": result.digest, "outcomes": outcomes}


def text_number(text: str) -> int:
    """64 bits for a text, which take a third of its memory."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


def _crop(tree: dict[str, Any]) -> Crop:
    box, outline, size = tree["box"], tree["outline"], tree["labelled_size"]
    restored = {
        "box": None if box is None else Box(*box),
        "outline": None if outline is None else tuple((x, y) for x, y in outline),
        "captions": tuple(tree["captions"]),
        "labelled_size": None if size is None else (size[0], size[1]),
    }
    return Crop(**{**tree, **restored})
