"""Photographs and labels that a source has more than once, and what is to become of their pairs.

Photographs are the same where their files have the same bytes, or where several labels are of one file. Of such a group

- on both sides of the source's own split, the training pairs are set aside: held-out figures would be of pictures that were
  learned (`in_both_splits`);
- labels that say the same of one object give one pair, the first (`duplicate_label` of one file, `duplicate_photo` of two);
- labels that say different things of one object give none: nothing here tells which is right (`contradicting_labels`);
- labels of different objects give all their pairs.

Two labels mean one object when they call it by one kind and their boxes overlap by half, or one of them has none. Without a
split of the source's own, the whole group goes to the side of its first photograph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.label_format import Box
from engine.data.sources import Crop

_SAME_OBJECT = 0.5  # intersection over union


@dataclass(frozen=True)
class GroupedCrop:
    """A crop that was written, of a photo whose file or content another one has too."""

    number: tuple[int, int]  # of the photo, and of the crop in it
    image: str
    crop: Crop


@dataclass(frozen=True)
class Verdict:
    """Why a crop is set aside."""

    cause: str
    reason: str


def judge_group(crops: Sequence[GroupedCrop], *, has_sides: bool) -> dict[tuple[int, int], Verdict]:
    """The crops of one group of equal photographs that are set aside, by their numbers.

    Args:
        crops: in the order of their records.
        has_sides: the split is the source's own.
    """
    verdicts: dict[tuple[int, int], Verdict] = {}
    held_out = next((item for item in crops if item.crop.split == "validation"), None)
    if has_sides and held_out is not None:
        for item in crops:
            if item.crop.split == "train":
                reason = f"the same photograph is held out: {held_out.crop.record}"
                verdicts[item.number] = Verdict("in_both_splits", reason)
    kept: list[GroupedCrop] = []
    for item in crops:
        if (
            item.number in verdicts or item.crop.labelled_size is None
        ):  # captions of plain sources are free: many are right
            continue
        same = next((other for other in kept if _is_same_object(item.crop, other.crop)), None)
        if same is None:
            kept.append(item)
        elif _says_the_same(item.crop, same.crop):
            if same.number not in verdicts:
                cause = "duplicate_label" if item.image == same.image else "duplicate_photo"
                verdicts[item.number] = Verdict(cause, f"the same is labelled by {same.crop.record}")
            else:
                verdicts[item.number] = verdicts[same.number]
        else:
            for one, other in ((item, same), (same, item)):
                reason = f"{other.crop.record} says something else of the same object: correct one, remove the other"
                verdicts.setdefault(one.number, Verdict("contradicting_labels", reason))
    return verdicts


def _is_same_object(one: Crop, other: Crop) -> bool:
    if one.object_key.rpartition("_")[0] != other.object_key.rpartition("_")[0]:
        return False
    if one.text == other.text and one.object_key != other.object_key:
        return False  # of one label file, which counts them
    return one.box is None or other.box is None or overlap(one.box, other.box) >= _SAME_OBJECT


def _says_the_same(one: Crop, other: Crop) -> bool:
    return (one.captions, one.attributes) == (other.captions, other.attributes)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    shared = max(0.0, width) * max(0.0, height)
    whole = one.width * one.height + other.width * other.height - shared
    return shared / whole if whole > 0 else 0.0
