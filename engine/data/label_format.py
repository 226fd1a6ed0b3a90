"""Interface to a data set's label files: photos, and in each the labelled objects with box, caption and attributes.

A data set with labels of its own implements `LabelFormat`; engine.data.formats is where one is chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from engine.errors import InputError
from engine.text import TextDefect

Attributes = Mapping[str, str | list[str]]
"""What is labelled of an object: attribute to value, or to several."""

LabelDefect = Literal["unreadable_label", "empty_file", "wrong_encoding", "broken_json", "wrong_structure"] | TextDefect


class LabelFault(InputError):
    """A label file that cannot be read; `defect` is one word for reports, `remedy` says what is wrong with it."""

    def __init__(self, defect: LabelDefect, path: Path, remedy: str) -> None:
        self.defect: LabelDefect = defect
        self.path = path
        super().__init__("label", path, remedy)


class Box(NamedTuple):
    """A rectangle as the label has it, in (possibly fractional) pixels of the photo, as stored or as seen upright; x, y is top-left."""

    x: float
    y: float
    width: float
    height: float


Outline = tuple[tuple[float, float], ...]
"""The (x, y) corners of a polygon, closed, in (possibly fractional) pixels of the photo, as its box."""


@dataclass(frozen=True)
class LabelledObject:
    """One object of a photo: one crop, one caption.

    Args:
        name: for reports.
        key: file name part that is unique in the photo.
        caption: of the object, or of the whole photo if the format's options say so; "" if nothing is labelled.
        attributes: as a prepared folder stores them; {} if nothing is labelled.
        box: None when there is none, or when `box_fault` says why it could not be read.
        outline: at least three points; None when there is none, or when `outline_fault` says why it could not be read.
    """

    name: str
    key: str
    caption: str
    attributes: Attributes
    box: Box | None = None
    box_fault: str = ""
    outline: Outline | None = None
    outline_fault: str = ""


@dataclass(frozen=True)
class PhotoLabel:
    """One label file.

    Args:
        photo: identifier.
        image_names: stems under which the photo may be stored, when it is not the label file's.
        width, height: of the photo, in pixels, as labelled.
        unknown_values: one line for each attribute or value outside the format's vocabulary.
        notes: content of the file that was not understood.
    """

    photo: str
    image_names: tuple[str, ...]
    width: int | None
    height: int | None
    objects: tuple[LabelledObject, ...]
    unknown_values: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class LabelFormat(Protocol):
    """The label files of one data set, and how captions are made of them."""

    def read(self, path: Path) -> PhotoLabel:
        """Raises LabelFault."""
        ...

    def options(self) -> dict[str, Any]:
        """What captions were made with, for the prepared folder's report."""
        ...


def say_the_same(one: Path, other: Path, label_format: LabelFormat) -> bool:
    """Whether two label files have the same photo's id and the same objects; not where one of them cannot be read."""
    try:
        first, second = label_format.read(one), label_format.read(other)
    except LabelFault:
        return False
    return (first.photo, first.objects) == (second.photo, second.objects)
