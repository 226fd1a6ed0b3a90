"""K-Fashion's label files as `engine.data.label_format.LabelFormat`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.data.kfashion.caption_options import CaptionScope, ListValues
from engine.data.kfashion.captions import caption, ordered
from engine.data.kfashion.labels import GARMENT_TYPES, Garment, Label, read_label, unknown_values
from engine.data.label_format import Attributes, LabelledObject, PhotoLabel


@dataclass(frozen=True)
class KFashionLabels:
    """Reads K-Fashion labels; the options decide the captions.

    Args:
        caption_scope: `garment` describes the cropped garment alone, `photo` all in the photo.
        style: keep sentences about 스타일 (KoDALLE trains without).
        subject_once: write `상의에서` once per garment.
        list_values: all values of 디테일, 소재, 프린트, or the first.
    """

    caption_scope: CaptionScope = "garment"
    style: bool = False
    subject_once: bool = False
    list_values: ListValues = "all"

    def read(self, path: Path) -> PhotoLabel:
        """Raises LabelFault."""
        label = read_label(path)
        return PhotoLabel(
            photo=label.photo,
            image_names=(label.photo, Path(label.image_file_name).stem),
            width=label.width,
            height=label.height,
            objects=tuple(self._object(label, garment) for garment in label.garments),
            unknown_values=tuple(unknown_values(label)),
            notes=label.notes,
        )

    def captions(self, path: Path, *, per_garment: bool = False) -> list[str]:
        """The caption of a label file, or one for each garment. Raises LabelFault."""
        label = read_label(path)
        parts: list[list[Garment] | None] = [[garment] for garment in label.garments] if per_garment else [None]
        return [self._caption(label, part) for part in parts]

    def options(self) -> dict[str, Any]:
        return asdict(self)

    def _object(self, label: Label, garment: Garment) -> LabelledObject:
        attributes: Attributes = {}
        if garment.attributes:
            attributes = {"garment": garment.garment_type, **ordered(garment.attributes)}
        return LabelledObject(
            name=garment.name,
            key=f"{GARMENT_TYPES[garment.garment_type]}_{garment.index}",
            caption=self._caption(label, [garment] if self.caption_scope == "garment" else None),
            attributes=attributes,
            box=garment.box,
            box_fault=garment.box_fault,
            outline=garment.outline,
            outline_fault=garment.outline_fault,
        )

    def _caption(self, label: Label, garments: list[Garment] | None) -> str:
        return caption(label, garments, style=self.style, subject_once=self.subject_once, list_values=self.list_values)
